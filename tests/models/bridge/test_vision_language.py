"""Learning of vision-language models from conversations with images, against PyTorch."""

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.models.images_in_text import COUNT, PIXELS
from adamerge_jax.objectives import NOT_PREDICTED
from adamerge_jax.pipeline.run import learn
from adamerge_jax.pipeline.workspace import Workspace, open_workspace
from adamerge_jax.recipes.loading import parse_recipe
from tests.language_references import rows_of
from tests.vision_language_references import TASKS, save_vision_language

SIZE = (16, 24)
PIECES = (16 // 4) * (24 // 4) // 2**2
"""Tokens of an image: patches of 4 x 4 pixels, merged by 2 x 2."""


class Tiny(NamedTuple):
    """A Qwen2-VL with two experts, opened, and a finished run."""

    fields: dict[str, Any]
    workspace: Workspace
    run: Path
    printed: str


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("vision_language")
    fields = save_vision_language(root) | {
        "objectives": [
            {"name": "logit_alignment"},
            {"name": "hidden_state_alignment", "options": {"layers": [-1]}},
        ],
        "coefficients": {"granularity": "tensor", "initial": 0.3},
        "keep_from_base": ["visual.merger.*"],
        "learning": {
            "steps": 2,
            "batch_size": 2,
            "evaluate_every": 2,
            "optimizer": {"learning_rate": 0.05},
        },
    }
    recipe = parse_recipe(fields)
    console = Console(file=io.StringIO(), width=200)
    run = learn(recipe, root=Path("/"), out=root / "run", console=console)
    workspace = open_workspace(recipe, Path("/"))
    return Tiny(fields, workspace, run.folder, console.file.getvalue())


def reference(folder: Path, row: dict[str, Any], root: Path, *, answered: bool) -> dict[str, Any]:
    """The inputs of a conversation, made without the package."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = row["messages"][: None if answered else 1]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=not answered
    )
    text = text.replace("<|image_pad|>", "<|image_pad|>" * PIECES)
    inputs = dict(tokenizer([text], return_tensors="pt", add_special_tokens=False))
    inputs.pop("token_type_ids", None)
    names = [part["image"] for part in row["messages"][0]["content"] if part["type"] == "image"]
    if names:
        images = [Image.open(root / name).resize(SIZE[::-1], Image.BICUBIC) for name in names]
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        inputs |= dict(processor(images, return_tensors="pt"))
        token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == token).int()
    return inputs


def test_the_merge_is_pytorchs(tiny):
    """The learned merge's logits, on every conversation of a task, are those of `transformers`."""
    checkpoint = tiny.run / "checkpoint"
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint).eval()
    workspace, task = tiny.workspace, TASKS[0]
    examples = workspace.data.test[task]
    tensors = load_file(checkpoint / "model.safetensors")
    parameters = {name: tensors[name] for name in workspace.backbone.shapes}
    index = np.arange(len(examples))
    length = examples.padded_length(index)
    inputs = examples.take(index, length)
    labels = examples.take_labels(index, length)
    logits, _ = workspace.evaluator.run(parameters, task, inputs)
    assert inputs[COUNT].tolist() == [1, 1, 1, 2, 0, 1, 1, 2]
    assert inputs[PIXELS].shape[1:5] == (2, 1, 4, 6)
    file = Path(tiny.fields["tasks"][task]["test"])
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for place, row in enumerate(rows_of(file)):
        given = reference(checkpoint, row, file.parent, answered=True)
        count = given["input_ids"].shape[1]
        np.testing.assert_array_equal(inputs["input_ids"][place, :count], given["input_ids"][0])
        assert inputs["attention_mask"][place].sum() == count
        with torch.no_grad():
            expected = model(**given).logits[0].numpy()
        # float32 on both sides, of logits up to 3
        np.testing.assert_allclose(logits[place, :count], expected, atol=1e-4)
        answer = labels[place][labels[place] != NOT_PREDICTED]
        assert tokenizer.decode(answer) == row["messages"][1]["content"][0]["text"]


def test_vision_is_merged_too_but_for_what_is_kept(tiny):
    coefficients = Coefficients.load(tiny.run / "coefficients.safetensors")
    vision = [name for name in coefficients.values if name.startswith("visual.")]
    assert len(vision) > 10 and not any("merger" in name for name in vision)
    moved = [np.abs(np.asarray(coefficients.values[name]) - 0.3).max() for name in vision]
    assert np.median(moved) > 0.01
    base = load_file(Path(tiny.fields["base"]) / "model.safetensors")
    merged = load_file(tiny.run / "checkpoint" / "model.safetensors")
    assert merged.keys() == base.keys()
    unchanged = {name for name in base if np.array_equal(base[name], merged[name])}
    assert unchanged == {name for name in base if name.startswith("visual.merger.")}


def test_transformers_generates_from_the_export(tiny):
    checkpoint = tiny.run / "checkpoint"
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert isinstance(model, Qwen2VLForConditionalGeneration)
    file = Path(tiny.fields["tasks"][TASKS[0]]["test"])
    given = reference(checkpoint, rows_of(file)[3], file.parent, answered=False)
    written = model.generate(**given, max_new_tokens=4, do_sample=False)
    count = given["input_ids"].shape[1]
    assert written.shape[1] > count
    card = (checkpoint / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "AutoProcessor" in card
