"""The small files of a checkpoint beside its config and weights.

Only files whose names are those of a tokenizer, a processor or generation settings are copied, and
never Python files: what a config says of them (`auto_map`) is left out.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adamerge_jax.checkpoints.config_export import (
    tokenizer_readable_by_older_versions,
    with_special_tokens,
)
from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.tokenizer_files import (
    CONFIG_FILE,
    has_tokenizer,
    is_known_class,
    tokenizer_files,
)
from adamerge_jax.errors import InputError
from adamerge_jax.files.json_object import read_object, write_json

_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
)
_GENERATION_FILE = "generation_config.json"

_SETTINGS = (*_PROCESSOR_FILES, CONFIG_FILE, _GENERATION_FILE)
"""Files of fields, which may name Python files."""


def copy_assets(checkpoint: Checkpoint, others: Sequence[Checkpoint], folder: Path) -> None:
    """Copies the tokenizer, processor and generation settings of a checkpoint.

    Args:
        checkpoint: The checkpoint whose files are copied.
        others: Checkpoints to take the tokenizer or the processor from if it has none: the first
            one that has.
        folder: The folder to copy them to.

    Raises:
        InputError: A file is a link out of its folder, or holds no fields where it must.
    """
    candidates = (checkpoint, *others)
    with_tokenizer = next(filter(has_tokenizer, candidates), checkpoint)
    with_processor = next(filter(_processor_files, candidates), checkpoint)
    for source, files in (
        (with_tokenizer, tokenizer_files(with_tokenizer)),
        (with_processor, _processor_files(with_processor)),
        (checkpoint, _generation_files(checkpoint)),
    ):
        for file in files:
            copy_file(file, source.folder, folder)


def copy_generation_settings(
    checkpoints: Sequence[Checkpoint], token_ids: Mapping[str, Any], folder: Path
) -> None:
    """Copies generation settings with other special tokens.

    Args:
        checkpoints: The checkpoints to take them from: the first one that has any.
        token_ids: The ids of special tokens by their fields.
        folder: The folder to copy them to.

    Raises:
        InputError: They hold no fields.
    """
    for checkpoint in checkpoints:
        for file in _generation_files(checkpoint):
            fields = with_special_tokens(_read_settings(file)[0], token_ids)
            write_json(folder / file.name, fields)
            return


def require_copyable(checkpoint: Checkpoint) -> None:
    """Refuses small files of a checkpoint that cannot be copied.

    Raises:
        InputError: A file is a link out of its folder, or holds no fields where it must.
    """
    for file in (
        *tokenizer_files(checkpoint),
        *_processor_files(checkpoint),
        *_generation_files(checkpoint),
    ):
        require_of_folder(file, checkpoint.folder)
        if file.name in _SETTINGS:
            read_object(file)


def _processor_files(checkpoint: Checkpoint) -> list[Path]:
    files = [checkpoint.folder / name for name in _PROCESSOR_FILES]
    return [file for file in files if file.is_file()]


def _generation_files(checkpoint: Checkpoint) -> list[Path]:
    file = checkpoint.folder / _GENERATION_FILE
    return [file] if file.is_file() else []


def copy_file(file: Path, source: Path, folder: Path) -> None:
    """Copies a file below the folder `source` to the same place below `folder`.

    Raises:
        InputError: It is a link out of its folder, or holds no fields where it must.
    """
    require_of_folder(file, source)
    target = folder / file.relative_to(source)
    target.parent.mkdir(exist_ok=True)
    settings, differ = _read_settings(file) if file.name in _SETTINGS else ({}, False)
    if differ:
        write_json(target, settings)
    else:
        shutil.copyfile(file, target)


def require_of_folder(file: Path, source: Path) -> None:
    """Refuses a link to a file elsewhere, which would be published with the merge.

    A link to a file of the same name is one that its owner made to share it, and in the Hub's
    cache every file of a snapshot is a link to a blob beside the snapshots.

    Raises:
        InputError: With the link and its target.
    """
    target, root = file.resolve(), source.resolve()
    is_inside = target.is_relative_to(root)
    is_blob = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    if not (is_inside or is_blob or target.name == file.name):
        raise InputError(
            f"{file} is a link to {target}, outside of its folder; put the file itself there"
        )


def _read_settings(file: Path) -> tuple[dict[str, Any], bool]:
    """Returns the settings in a file as a merge has them, and True if they differ from the file."""
    fields = read_object(file)
    settings = _without_code(fields)
    if file.name == CONFIG_FILE:
        settings = tokenizer_readable_by_older_versions(settings)
        tokenizer_class = fields.get("tokenizer_class") if "auto_map" in fields else None
        if tokenizer_class is not None and not is_known_class(tokenizer_class):
            # A class of its own code; `transformers` reads tokenizer.json in its place.
            del settings["tokenizer_class"]
            if file.with_name("tokenizer.json").is_file():
                settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    return settings, settings != fields


def _without_code(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings without what they say of Python files, which are not copied."""
    return {
        name: _without_code(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if name not in ("auto_map", "custom_pipelines")
    }
