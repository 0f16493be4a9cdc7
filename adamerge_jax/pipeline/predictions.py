"""The classes that a merge gives test examples, and some on which it differs from experts."""

import base64
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from adamerge_jax.data.class_names import names_of_outputs
from adamerge_jax.data.examples import Examples
from adamerge_jax.data.tokenizers import find_tokenizer
from adamerge_jax.pipeline.workspace import Workspace
from adamerge_jax.runs.predictions import (
    MOST_CLASSES,
    Difference,
    Mistake,
    TaskPredictions,
)
from adamerge_jax.runs.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_SHOWN = 6
"""The number of examples of a task that are kept, to show them."""

LONGEST_TEXT = 300
"""The characters of a text that are kept."""

_SIDE = 72
"""The pixels of a kept image's longer side."""

Show = Callable[[Examples, int], tuple[str | None, str | None]]
"""From examples and a position to the text and the image, as they are kept."""


def predictions_of_run(
    workspace: Workspace, rows: Sequence[Row], tokenizer: str | None
) -> dict[str, TaskPredictions]:
    """Returns what a merge of classifiers takes for what, by task.

    Args:
        workspace: The models and the data.
        rows: The table of results, with the scores of examples, the merge last.
        tokenizer: The model whose tokenizer the merge takes; see `Recipe.tokenizer`.

    Returns:
        Nothing for models that give no classes.
    """
    test = workspace.data.test
    return predictions_on_test(
        test,
        rows,
        lambda task: _class_names(workspace, task, test[task]),
        lambda: _show_of(workspace, tokenizer),
    )


def predictions_on_test(
    test: Mapping[str, Examples],
    rows: Sequence[Row],
    class_names: Callable[[str], list[str]],
    make_show: Callable[[], Show],
) -> dict[str, TaskPredictions]:
    """Returns what a merge takes for what, by task.

    Args:
        test: The test examples by task.
        rows: The table of results, with the scores of examples, the merge last.
        class_names: From a task to the names of its classes, as far as they have some; called where
            a task has classes. The others are called by their numbers.
        make_show: Makes the function that makes examples visible; called where it is needed.

    Returns:
        Nothing for tasks without classes.
    """
    merged = rows[-1].examples or {}
    experts = next((row.examples or {} for row in rows if row.kind == "experts"), {})
    show: Show | None = None
    predictions = {}
    for task, examples in test.items():
        classes = merged[task].classes if task in merged else None
        if classes is None or examples.labels is None:
            continue
        of_expert = experts[task].classes if task in experts else None
        all_classes = [examples.labels, classes, *([] if of_expert is None else [of_expert])]
        names = class_names(task)
        most = max(int(array.max(initial=-1)) for array in all_classes) + 1
        if max(len(names), most) > MOST_CLASSES:
            continue
        names = [*names, *map(str, range(len(names), most))]
        pairs = Counter(zip(examples.labels.tolist(), classes.tolist(), strict=True))
        counts = [
            Mistake(label=label, merge=given, count=count)
            for (label, given), count in sorted(pairs.items())
        ]
        predictions[task] = TaskPredictions(class_names=names, counts=counts)
        if of_expert is not None:
            show = show or make_show()
            predictions[task] = predictions[task].model_copy(
                update=_differences(examples, classes, of_expert, show)
            )
    return predictions


def _class_names(workspace: Workspace, task: str, examples: Examples) -> list[str]:
    """Returns the names of a task's classes in the data, or else in the expert's config."""
    if examples.class_names is not None:
        return examples.class_names
    config = workspace.models.experts[task].checkpoint.config
    return names_of_outputs(getattr(config, "id2label", None))


def _differences(
    examples: Examples,
    merge: Int[np.ndarray, " N"],
    expert: Int[np.ndarray, " N"],
    show: Show,
) -> Mapping[str, object]:
    """Returns the numbers of examples on which the two differ, and some of them.

    Those come first on which the expert alone is right.
    """
    labels, differ = examples.labels, merge != expert
    merge_alone, expert_alone = differ & (merge == labels), differ & (expert == labels)
    index = np.flatnonzero(differ)
    first = index[np.argsort(~expert_alone[index], kind="stable")][:MOST_SHOWN]
    shown = []
    for position in map(int, first):
        text, image = show(examples, position)
        shown.append(
            Difference(
                index=position,
                label=int(labels[position]),
                expert=int(expert[position]),
                merge=int(merge[position]),
                text=text,
                image=image,
            )
        )
    return {
        "differing": int(differ.sum()),
        "merge_alone_right": int(merge_alone.sum()),
        "expert_alone_right": int(expert_alone.sum()),
        "differences": shown,
    }


def _show_of(workspace: Workspace, chosen: str | None) -> Show:
    """Returns the function that makes examples visible."""
    tokenizer: PreTrainedTokenizerBase | None = None
    if workspace.models.family.inputs[:1] == ("input_ids",):
        tokenizer = find_tokenizer(workspace.models.by_name, chosen)

    def show(examples: Examples, position: int) -> tuple[str | None, str | None]:
        index = np.array([position])
        inputs = examples.take(index, examples.padded_length(index))
        if "pixel_values" in inputs:
            return None, small_png(inputs["pixel_values"][0])
        if tokenizer is None or inputs["input_ids"].ndim != 2:
            return None, None
        mask = inputs.get("attention_mask", np.ones_like(inputs["input_ids"]))
        ids = inputs["input_ids"][0][mask[0] == 1].tolist()
        text = " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
        return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}...", None

    return show


def small_png(pixels: Float[np.ndarray, "channels height width"]) -> str | None:
    """Returns a model's input as a small PNG, base64; None where it is no image to look at.

    What the processor made of the image is spread over the range from black to white.
    """
    from PIL import Image

    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or not np.isfinite(pixels).all():
        return None
    low, high = float(pixels.min()), float(pixels.max())
    values = (pixels - low) / ((high - low) or 1.0)
    array = np.round(255 * values).astype(np.uint8).transpose(1, 2, 0)
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    factor = _SIDE / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    stream = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST).save(
        stream, format="PNG"
    )
    return base64.b64encode(stream.getvalue()).decode()
