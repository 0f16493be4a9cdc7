"""Checkpoints that lie in a subfolder of the folder that was named."""

import re
from pathlib import Path

from adamerge_jax.errors import InputError, and_more

_MODEL_FILES = (
    *("adapter_config.json", "model.safetensors", "model.safetensors.index.json"),
    "model_index.json",  # of a diffusion pipeline
)
"""Files of which a folder with a model or an adapter has one."""

_SHOWN = 3
"""The number of subfolders that a message names."""


def require_not_nested(folder: Path) -> None:
    """Refuses a folder without a model whose subfolders have one.

    The folder is not chosen here: a training run may go on, and the latest of its checkpoints need
    not be the best.

    Args:
        folder: A folder of this machine.

    Raises:
        InputError: With the subfolders, which are snapshots of the Hub's cache, checkpoints of a
            training run, or models and adapters under names of their own.
    """
    if _has_model(folder):
        return
    if snapshots := _with_models(folder / "snapshots"):
        hub_name = folder.name.removeprefix("models--").replace("--", "/")
        raise InputError(
            f"{folder} is the Hub's cache of {hub_name}; give {hub_name}, or the folder of one "
            f"snapshot: {_listed(snapshots)}"
        )
    inside = _with_models(folder)
    steps = {
        int(match[1]): path
        for path in inside
        if (match := re.fullmatch(r"checkpoint-(\d{1,18})", path.name))
    }
    if steps:
        latest = [steps[step] for step in sorted(steps, reverse=True)]
        raise InputError(
            f"{folder} has no model of its own, but the checkpoints of a training run; give the "
            f"folder of the one to merge: {_listed(latest)}"
        )
    if inside:
        raise InputError(
            f"{folder} has no model of its own, but a subfolder has; give the folder to merge: "
            f"{_listed(inside)}"
        )


def _with_models(folder: Path) -> list[Path]:
    """Returns the subfolders that hold a model or an adapter; none if there is no such folder."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and _has_model(path))
    except OSError:
        return []


def _has_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _MODEL_FILES)


def _listed(folders: list[Path]) -> str:
    more = and_more(max(0, len(folders) - _SHOWN))
    return " or ".join(str(folder) for folder in folders[:_SHOWN]) + more
