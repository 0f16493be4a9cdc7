"""A diffusion pipeline: a folder of models that work together, such as a U-Net and text encoders.

`model_index.json` names the components. Each lies in a folder of its name:

    pipeline/
      model_index.json
      unet/          config.json  diffusion_pytorch_model.safetensors
      text_encoder/  config.json  model.fp16.safetensors
      tokenizer/     tokenizer_config.json  vocab.json  merges.txt
      scheduler/     scheduler_config.json

The pipeline is read as one checkpoint whose tensors are named after their component:
`unet.conv_in.weight`. The classes that its files name are never imported.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adamerge_jax.checkpoints.config_file import CONFIG_FILE, Fields, classes_of
from adamerge_jax.checkpoints.huggingface import (
    INDEX_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    read_indexed_headers,
    refuse_pickled,
)
from adamerge_jax.checkpoints.pipeline_index import PIPELINE_FILE, component_names
from adamerge_jax.checkpoints.safetensors_file import TensorInfo, read_header
from adamerge_jax.checkpoints.scaled import restored_in_words, with_scales
from adamerge_jax.checkpoints.shards import MODEL_STEM
from adamerge_jax.errors import InputError, shorten
from adamerge_jax.files.json_object import read_object, read_object_if_there

log = logging.getLogger(__name__)

_ALONE = "model"
"""The name of a single component."""

LOADED_BY = "DiffusionPipeline"
"""The class of `diffusers` that loads a pipeline."""

_DIFFUSERS_STEM = "diffusion_pytorch_model"
"""The beginning of the names of weight files of `diffusers`."""

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
"""A part of the name of a file that an index names: `model.fp16-00001-of-00002.safetensors`."""

_LORA_FILE = "pytorch_lora_weights.safetensors"

_LIBRARIES = ("diffusers", "transformers")
"""Libraries whose classes a pipeline may name; other names stand for Python files."""

_SETTINGS = "scheduler_config.json"
"""The settings that decide what a model's outputs mean."""

_OF_FILES = ("_name_or_path", "_diffusers_version", "transformers_version", "torch_dtype", "dtype")
"""Fields of a config that say nothing of the model."""


@dataclass(frozen=True)
class Component:
    """A part of a pipeline that has weights.

    Attributes:
        fields: The fields of its config.json.
        stem: The beginning of the names of its weight files, that of `transformers` or `diffusers`.
        tensors: Its tensors by their names in the files.
        scaled: The number of tensors that are restored from numbers with scales.
    """

    fields: Fields = field(repr=False)
    stem: str
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    scaled: int

    @property
    def class_name(self) -> str:
        """The name of its class, as its config has it."""
        first = next(iter(classes_of(self.fields)), None)
        return str(self.fields.get("_class_name") or first or self.fields.get("model_type"))


@dataclass(frozen=True, eq=False, kw_only=True)
class Pipeline(Checkpoint):
    """A diffusion pipeline, opened as one checkpoint.

    Attributes:
        components: The parts that have weights, by name.
        copied: The names of all other parts, such as a tokenizer and a scheduler.
        absent: The names of parts that its index names and whose folders are not there.
        is_whole: False for a single component, whose files lie in the folder itself.
    """

    components: Mapping[str, Component] = field(repr=False)
    copied: tuple[str, ...]
    absent: tuple[str, ...]
    is_whole: bool


def component_of(tensor: str) -> str:
    """Returns the component that a tensor of a pipeline belongs to."""
    return tensor.partition(".")[0]


def open_pipeline(source: str, folder: Path) -> Pipeline:
    """Opens a diffusion pipeline: reads its settings and the headers of its weight files.

    Args:
        source: The folder or Hub name, as the user wrote it.
        folder: The folder of its files.

    Raises:
        InputError: A file is missing, damaged or pickled, or a component has a name that is none.
    """
    index = read_object(folder / PIPELINE_FILE)
    components, copied, absent = {}, [], []
    for name in component_names(index, folder):
        part = folder / name
        if not part.is_dir():
            absent.append(name)
        elif (part / CONFIG_FILE).is_file() or any(part.glob("*.safetensors")):
            components[name] = _open_component(part)
        else:
            copied.append(name)
    if not components:
        raise InputError(
            f"{folder / PIPELINE_FILE} names no component whose folder is there and has weights; "
            "give the folder that `save_pretrained` of a pipeline wrote"
        )
    _warn_of_code(folder, index)
    return _made(source, folder, components, copied=tuple(copied), absent=tuple(absent))


def is_component(folder: Path) -> bool:
    """Returns True for the folder of a model of `diffusers`, which names its class."""
    fields = read_object_if_there(folder / CONFIG_FILE)
    return "model_type" not in fields and isinstance(fields.get("_class_name"), str)


def open_component(source: str, folder: Path) -> Pipeline:
    """Opens a single component of a pipeline, such as a U-Net that was trained alone.

    Args:
        source: The folder or Hub name, as the user wrote it.
        folder: The folder of its files.

    Raises:
        InputError: A file is missing, damaged or pickled.
    """
    return _made(source, folder, {_ALONE: _open_component(folder)}, is_whole=False)


def require_all_components(base: Pipeline) -> None:
    """Refuses a base whose index names a component that is not there.

    Raises:
        InputError: With the component.
    """
    if base.absent:
        raise InputError(
            f"{base.source} lacks the folder of {base.absent[0]}, which its {PIPELINE_FILE} names; "
            "copy or download it again"
        )


def absent_components(base: Checkpoint, expert: Checkpoint) -> list[str]:
    """Returns patterns of the tensors of those components that an expert has not.

    Args:
        base: The base.
        expert: The expert; there are none if one of them is no pipeline.
    """
    if not (isinstance(base, Pipeline) and isinstance(expert, Pipeline)):
        return []
    return [f"{name}.*" for name in base.components if name not in expert.components]


def require_same_pipeline(base: Checkpoint, expert: Checkpoint, *, role: str) -> None:
    """Refuses an expert that has other models than the base under the names of its components.

    Settings that differ and change no shape are named in a warning: the merge has the base's.

    Args:
        base: The base.
        expert: The expert.
        role: Its role in the merge, for messages: `expert 'anime'`.

    Raises:
        InputError: One of them is no pipeline, they have no component in common, or the class of
            one differs.
    """
    where = f"{role} ({expert.source})"
    if not (isinstance(base, Pipeline) and isinstance(expert, Pipeline)):
        kinds = [
            "a diffusion pipeline" if isinstance(c, Pipeline) else "one model"
            for c in (expert, base)
        ]
        raise InputError(
            f"{where} is {kinds[0]}, the base ({base.source}) is {kinds[1]}; an expert must be "
            "fine-tuned from the base"
        )
    shared = [name for name in base.components if name in expert.components]
    if not shared:
        raise InputError(
            f"{where} has the components {', '.join(expert.components)}, the base ({base.source}) "
            f"has {', '.join(base.components)}; an expert must be fine-tuned from the base"
        )
    for name in shared:
        ours, theirs = base.components[name], expert.components[name]
        if ours.class_name != theirs.class_name:
            raise InputError(
                f"{where}: {name} is a {shorten(theirs.class_name)}, that of the base "
                f"({base.source}) is a {shorten(ours.class_name)}; an expert must be fine-tuned "
                "from the base"
            )
        _warn_of_differences(f"{where}: {name}/{CONFIG_FILE}", ours.fields, theirs.fields)
    for name in base.copied:
        files = [pipeline.folder / name / _SETTINGS for pipeline in (base, expert)]
        if all(file.is_file() for file in files):
            _warn_of_differences(f"{where}: {name}/{_SETTINGS}", *map(read_object, files))


def refuse_pipeline_adapter(folder: Path) -> None:
    """Refuses an adapter of a pipeline, which has a format of its own.

    Raises:
        InputError: The folder holds one.
    """
    if (folder / _LORA_FILE).is_file():
        raise InputError(
            f"{folder} holds a LoRA adapter of a diffusion pipeline ({_LORA_FILE}), which is not "
            "read; load it with diffusers, call fuse_lora() and save_pretrained(folder), and give "
            "that folder"
        )


def _made(
    source: str,
    folder: Path,
    components: Mapping[str, Component],
    *,
    copied: tuple[str, ...] = (),
    absent: tuple[str, ...] = (),
    is_whole: bool = True,
) -> Pipeline:
    """Returns components as one checkpoint."""
    from transformers import PretrainedConfig

    return Pipeline(
        source=source,
        folder=folder,
        config=PretrainedConfig(),
        config_fields={},
        tensors={
            f"{name}.{tensor}": info
            for name, component in components.items()
            for tensor, info in component.tensors.items()
        },
        notes=tuple(
            f"{name}: {restored_in_words(component.scaled)}"
            for name, component in components.items()
            if component.scaled
        ),
        components=components,
        copied=copied,
        absent=absent,
        is_whole=is_whole,
    )


def _open_component(folder: Path) -> Component:
    """Opens a part of a pipeline: files without a variant, or those of the one that is there."""
    fields = read_object_if_there(folder / CONFIG_FILE)
    files = [file for file in sorted(folder.iterdir()) if not _SHARD.search(file.name)]
    candidates: dict[tuple[str, str], Path] = {}
    for stem in (MODEL_STEM, _DIFFUSERS_STEM):
        for pattern in (
            rf"{stem}(?:\.([\w-]+))?\.safetensors",
            rf"{stem}\.safetensors\.index(?:\.([\w-]+))?\.json",
            rf"{stem}\.safetensors\.([\w-]+)\.index\.json",  # of older versions of diffusers
        ):
            for file in files:
                if match := re.fullmatch(pattern, file.name):
                    candidates.setdefault((match[1] or "", stem), file)
    variants = dict.fromkeys(variant for variant, _ in candidates)
    if not candidates:
        refuse_pickled(folder)
        raise InputError(
            f"{folder} has no safetensors weights: neither {_DIFFUSERS_STEM}.safetensors nor "
            f"{WEIGHTS_FILE} nor {INDEX_FILE}; copy or download it again"
        )
    if "" not in variants and len(variants) > 1:
        raise InputError(
            f"{folder} has weights of the variants {' and '.join(sorted(variants))}, and none "
            "without a variant; leave the files of one of them there"
        )
    variant = "" if "" in variants else next(iter(variants))
    stem, file = next((s, file) for (v, s), file in candidates.items() if v == variant)
    is_whole = file.suffix == ".safetensors"
    tensors = read_header(file) if is_whole else read_indexed_headers(file)
    restored, scaled = with_scales(tensors, fields, str(folder))
    return Component(fields, stem, restored, scaled)


def _warn_of_code(folder: Path, index: Fields) -> None:
    """Warns of Python files that a pipeline names: they are neither run nor copied."""
    named = [
        value[0]
        for name, value in index.items()
        if isinstance(value, list)
        and value
        and isinstance(value[0], str)
        and (name == "_class_name" or value[0] not in _LIBRARIES)
    ]
    if named:
        log.warning(
            "%s names code of its own (%s), which is neither run nor copied",
            folder / PIPELINE_FILE,
            shorten(", ".join(map(repr, named))),
        )


def _warn_of_differences(where: str, base: Fields, expert: Fields) -> None:
    """Warns of settings that an expert has and the merge has not."""
    differing = [
        name
        for name in base
        if name in expert and base[name] != expert[name] and name not in _OF_FILES
    ]
    if differing:
        log.warning(
            "%s has another %s than the base's; the merge has the base's",
            where,
            shorten(", ".join(differing)),
        )
