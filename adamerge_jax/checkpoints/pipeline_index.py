"""The index of a diffusion pipeline, `model_index.json`: the names of its components."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adamerge_jax.errors import InputError, shorten

PIPELINE_FILE = "model_index.json"

COPIED = (".json", ".txt", ".model", ".jinja", ".spm")
"""Endings of the files of tokenizers, schedulers and processors."""

_NAME = re.compile(r"[A-Za-z]\w{0,99}", re.ASCII)
"""Names of components, which are names of folders too."""


def is_pipeline(folder: Path) -> bool:
    """Returns True for the folder of a diffusion pipeline."""
    return (folder / PIPELINE_FILE).is_file()


def component_names(index: Mapping[str, Any], folder: Path) -> list[str]:
    """Returns the names of a pipeline's components, in the order of its index.

    Args:
        index: The index.
        folder: The folder of the pipeline, for messages.

    Raises:
        InputError: A name cannot be that of a folder.
    """
    names = []
    for name, value in index.items():
        # Other fields are settings of the pipeline, and [null, null] is an empty place.
        if name.startswith("_") or not isinstance(value, list) or not any(value):
            continue
        if not _NAME.fullmatch(name):
            raise InputError(
                f"{folder / PIPELINE_FILE} has a component called {shorten(repr(name))}, which "
                "cannot be the name of its folder; do not use it unless you know why"
            )
        names.append(name)
    return names
