"""From the folders of a base and its experts to the text of a recipe."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adamerge_jax.data.class_names import names_of_outputs, tell_nothing
from adamerge_jax.data.tokenizers import find_tokenizer
from adamerge_jax.drafting.columns import Columns, label_of
from adamerge_jax.drafting.data_files import PARTS, Data, Found, children, data_of_one, find_data
from adamerge_jax.drafting.kinds import Kind, kind_of, longest_text
from adamerge_jax.drafting.names import expand, task_names
from adamerge_jax.drafting.samples import Sample, read_sample
from adamerge_jax.drafting.writing import Part, TaskText, recipe_text
from adamerge_jax.errors import InputError, in_one_line
from adamerge_jax.files.strict_yaml import read_yaml
from adamerge_jax.pipeline.models import Models, open_models
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.report.plain_text import one_line

log = logging.getLogger(__name__)

_LONGEST_NOTE = 500

_LIMIT = 1000
"""Examples of a source with many rows that a recipe asks for."""


class Draft(NamedTuple):
    """A recipe and what was found for it.

    Attributes:
        text: The recipe as YAML, with comments.
        kind: The kind of the models in words.
        tasks: Names of the tasks.
        notes: Sentences on what could not be found, or was decided.
        learns: True if the recipe has all that `adamerge learn` needs.
    """

    text: str
    kind: str
    tasks: Sequence[str]
    notes: Sequence[str]
    learns: bool


class _Source(NamedTuple):
    """Data with their first rows; of the Hub none are read."""

    data: Data
    sample: Sample | None


def draft_recipe(
    base: str,
    experts: Sequence[str],
    data: Sequence[str],
    file: Path,
    *,
    start: str | None = None,
    dtype: str | None = None,
) -> Draft:
    """Writes a recipe for models and the data that lie with them.

    Models are opened as a run opens them, without reading a weight, so that what does not belong
    together is refused here.

    Args:
        base: The base's folder, or its name on the Hub.
        experts: Those of the experts, or a folder of several.
        data: Files and folders to look through, or `TASK=PATH` for a task's. Without any, `data/`
            beside the experts, beside the base or in the current folder.
        file: The file that the recipe is for; its relative paths start from the folder of it.
        start: The mergekit file whose weights learning starts from; None for the preset's start.
        dtype: The dtype of the merge; None for the base's.

    Raises:
        InputError: A model cannot be opened or is of another base, or there are no such data.
    """
    experts, folder = expand(experts), file.parent
    if _same(base, experts):
        raise InputError(f"{base} is the base and an expert; give the experts without it")
    tasks = task_names(experts)
    paths = {task: _written(path, folder) for task, path in zip(tasks, experts, strict=True)}
    base_path = _written(base, folder)
    fields: dict[str, Any] = {
        "base": base_path,
        "tasks": {task: {"expert": path} for task, path in paths.items()},
    }
    models, reason = _open(fields, folder)
    notes = []
    found = _find(tasks, data, [base, *experts])
    kinds = {
        task: kind_of(models.family, models.config, models.problems[task])
        for task in (() if reason else tasks)
    }
    texts = [TaskText(task, path) for task, path in paths.items()]
    chosen: dict[str, dict[str, _Source]] = {}
    if not kinds:
        notes.append(f"nothing can be learned: {reason}")
    else:
        chosen, texts = _with_data(kinds, models, found, texts, folder, notes)
    learns = bool(kinds) and all("calibration" in chosen.get(task, {}) for task in tasks)
    reads_text = any(kind.reads_text for kind in kinds.values())
    tokenizer = _tokenizer(models, chosen) if reads_text else None
    in_words = " and ".join(dict.fromkeys(kind.words for kind in kinds.values()))
    samples = {t: s["calibration"].sample for t, s in chosen.items() if "calibration" in s}
    text = recipe_text(
        base_path,
        texts,
        kinds=kinds,
        kinds_in_words=in_words or f"models merged by name ({_type_of(models)})",
        language=models.family.language if kinds else False,
        tokenizer=tokenizer,
        tokens=longest_text({t: s for t, s in samples.items() if s is not None}),
        reason=reason,
        name=file.name,
        schema=_SCHEMA_FILE if (folder / _SCHEMA_FILE).is_file() else None,
        start=start,
        dtype=dtype,
    )
    parse_recipe(read_yaml(text), str(file))  # which refuses what it could not run
    notes = [one_line(note, _LONGEST_NOTE) for note in notes]  # columns have strangers' names
    return Draft(text, in_words, tasks, notes, learns)


_SCHEMA_FILE = "recipe.schema.json"
"""The name under which docs tell to write the schema, beside recipes."""


def _open(fields: Mapping[str, Any], folder: Path) -> tuple[Models, str | None]:
    """Opens models, to run them or else to merge them by name, and says why they do not run."""
    recipe = parse_recipe(dict(fields))
    try:
        return open_models(recipe, folder, read_weights=False), None
    except InputError as error:
        reason = in_one_line(error)
        models = open_models(recipe, folder, read_weights=False, to_run=False)
        return models, reason


def _find(tasks: Sequence[str], given: Sequence[str], models: Sequence[str]) -> Found:
    """Finds data where the user says, or near the models."""
    of_one: Found = {}
    places = []
    for text in given:
        task, equals, path = text.partition("=")
        if equals and task in tasks:
            of_one[task] = data_of_one(path)
        elif equals and not Path(text).exists():
            raise InputError(f"--data {text}: {task!r} is no task; they are {', '.join(tasks)}")
        else:
            places.append(Path(text).expanduser())
    if not given:
        places = _near(models)
    return find_data(tasks, places) | of_one


def _near(models: Sequence[str]) -> list[Path]:
    """Returns the nearest folder called data, or the files that lie where the models do."""
    folders = [Path(model).expanduser().absolute() for model in models]
    above = [parent for folder in folders if folder.exists() for parent in folder.parents[:3]]
    for place in (*above, Path.cwd()):
        if (place / "data").is_dir():
            return [place / "data"]
    for place in above:
        files = [file for file in children(place) if file.is_file()]
        if any(file.suffix in (".jsonl", ".csv", ".parquet", ".npz") for file in files):
            return files
    return []


def _with_data(
    kinds: Mapping[str, Kind],
    models: Models,
    found: Found,
    texts: Sequence[TaskText],
    folder: Path,
    notes: list[str],
) -> tuple[dict[str, dict[str, _Source]], list[TaskText]]:
    """Chooses the data that the models can read, and writes their sections."""
    sections: dict[str, dict[str, Part]] = {}
    chosen: dict[str, dict[str, _Source]] = {}
    for task, parts in found.items():
        kind = kinds[task]
        sections[task], chosen[task] = {}, {}
        for part, data in parts.items():
            on_hub = not Path(data.path).expanduser().exists()
            source = _Source(data, None if on_hub else read_sample(data))
            columns = _columns(kind, part, source.sample)
            lacks = columns.lacks or _lacks_names(kind, models, task, part, source.sample)
            if lacks:
                notes.append(f"{task}: {data.path} is left out as {part} data: it {lacks}")
                continue
            chosen[task][part] = source
            sections[task][part] = _section(data, columns, source.sample, part, folder)
        _learn_from_another_part(kind, task, chosen[task], sections[task], folder, notes)
    for part in ("validation", "test"):
        having = [text.task for text in texts if part in sections.get(text.task, {})]
        lacking = [text.task for text in texts if text.task not in having]
        if having and lacking:
            notes.append(
                f"{part} data are of all tasks or of none, and {', '.join(lacking)} "
                f"{'has' if len(lacking) == 1 else 'have'} none: they are comments in the recipe"
            )
            for task in having:
                sections[task][part] = sections[task][part]._replace(is_comment=True)
    without = [text.task for text in texts if "calibration" not in sections.get(text.task, {})]
    if without:
        notes.append(f"no data to learn from were found for {', '.join(without)}: fill them in")
    return chosen, [text._replace(parts=sections.get(text.task, {})) for text in texts]


def _columns(kind: Kind, part: str, sample: Sample | None) -> Columns:
    if sample is not None and not sample.columns:
        return Columns({}, "is empty")
    if sample is None:
        return Columns({"label": "label"} if kind.has_heads and part != "calibration" else {})
    return kind.calibration(sample) if part == "calibration" else kind.scored(sample)


def _learn_from_another_part(
    kind: Kind,
    task: str,
    chosen: dict[str, _Source],
    sections: dict[str, Part],
    folder: Path,
    notes: list[str],
) -> None:
    """Takes validation or test data to learn from where a task has no others; labels stay out."""
    other = next((part for part in ("validation", "test") if part in chosen), None)
    if "calibration" in chosen or other is None:
        return
    source = chosen[other]
    columns = _columns(kind, "calibration", source.sample)
    if columns.lacks:
        return
    chosen["calibration"] = source
    section = _section(source.data, columns, source.sample, "calibration", folder)
    sections["calibration"] = section._replace(comment=f"the {other} data, without their labels")
    notes.append(f"{task}: no other data than {other} data were found; they are learned from")


def _section(data: Data, columns: Columns, sample: Sample | None, part: str, folder: Path) -> Part:
    fields: dict[str, Any] = {"path": _written(data.path, folder)}
    if data.split is not None:
        fields["split"] = data.split
    fields |= columns.fields
    comment = "look up its splits and columns" if sample is None else ""
    if sample is not None and sample.is_many and part == "calibration":
        fields["limit"] = _LIMIT
        comment = "a thousand are plenty to learn from"
    # Not every data set of the Hub has a split for it.
    is_guess = sample is None and part != "calibration"
    return Part(fields if len(fields) > 1 else fields["path"], comment, is_guess)


def _lacks_names(
    kind: Kind, models: Models, task: str, part: str, sample: Sample | None
) -> str | None:
    """Returns in words that labels are names which cannot be put into the order of outputs."""
    if sample is None or sample.arrays or not kind.of_classes:
        return None
    if models.family.auto_class is None:
        label = label_of(sample)
        named = label in sample.class_names or _are_names(sample, label)
        return None if named or part == "calibration" else "names no classes; give class_names"
    if part == "calibration":
        return None
    label = label_of(sample)
    outputs = names_of_outputs(models.experts[task].checkpoint.config.id2label)
    if label not in sample.class_names and _are_names(sample, label) and tell_nothing(outputs):
        return "has names of classes, and the expert's config has none: give class_names"
    return None


def _are_names(sample: Sample, label: str | None) -> bool:
    values = sample.columns.get(label or "", ())
    return any(isinstance(value, str) and not value.strip().isdecimal() for value in values)


def _tokenizer(models: Models, chosen: Mapping[str, Mapping[str, _Source]]) -> str | None:
    """Returns whose tokenizer the merge has to be told to take; None where none need be named.

    A tokenizer without a chat template cannot write the conversations that tasks may have.
    """
    samples = [s.sample for parts in chosen.values() for s in parts.values() if s.sample]
    chats = any(isinstance(v[0], list) for s in samples for v in s.columns.values() if len(v))
    first_error: InputError | None = None
    for candidate in (None, *models.by_name):
        try:
            tokenizer = find_tokenizer(models.by_name, candidate)
        except InputError as error:
            first_error = first_error or error
            continue
        if tokenizer is None:
            log.warning("neither the base nor an expert comes with a tokenizer; save one")
            return None
        if not chats or tokenizer.chat_template:
            return candidate
    if first_error is not None:
        raise first_error
    return None


def _written(path: str, folder: Path) -> str:
    """Returns a path as a recipe in a folder names it; Hub names stay."""
    place = Path(path).expanduser()
    if not place.exists():
        return path
    place, folder = Path(os.path.abspath(place)), Path(os.path.abspath(folder))
    return str(place.relative_to(folder)) if place.is_relative_to(folder) else str(place)


def _same(base: str, experts: Sequence[str]) -> bool:
    folder = Path(base).expanduser()
    others = [Path(expert).expanduser() for expert in experts]
    if not folder.exists():
        return base in experts
    return any(other.exists() and other.samefile(folder) for other in others)


def _type_of(models: Models) -> str:
    """Returns the type of models as their file has it, which may be any text."""
    return one_line(getattr(models.config, "model_type", None) or "no config")


__all__ = ["PARTS", "Draft", "draft_recipe"]
