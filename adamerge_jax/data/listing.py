"""The files of a folder, and the names of splits."""

import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path, PurePath

from adamerge_jax.errors import InputError

DEEPEST = 3
"""Folders within each other that are looked into, the folder of the data included."""

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}

_SHOWN = 4


def files_below(folder: Path) -> list[PurePath]:
    """Returns the files in a folder and in those within it, relative to it, sorted.

    Hidden files and folders do not count, nor those that archives of macOS bring.
    """
    files = []
    for place, folders, names in os.walk(folder, followlinks=True):
        inner = PurePath(place).relative_to(folder)
        # Links that lead in a circle end here too.
        deeper = len(inner.parts) < DEEPEST
        folders[:] = [name for name in folders if deeper and _counts(name)]
        files += [inner / name for name in names if _counts(name)]
    return sorted(files, key=lambda file: file.parts)


def split_of(name: str) -> str | None:
    """Returns the split that a word stands for: `train`, `validation` or `test`; None for none."""
    return next((split for split, words in _SPLITS.items() if name.lower() in words), None)


def require_no_split(path: Path, split: str) -> None:
    """Refuses a split, other than the default one, of data that are not divided into splits.

    Raises:
        InputError: The split is not that for training.
    """
    if split_of(split) != "train":
        raise InputError(
            f"{path} is not divided into splits, so it has no split {split!r}; leave split out, or "
            "give the file or folder of that split"
        )


def in_words(names: Iterable[str]) -> str:
    """Returns the first names of a list for a message."""
    names = iter(names)
    shown = list(islice(names, _SHOWN))
    return ", ".join([*shown, "..."] if next(names, None) is not None else shown)


def _counts(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"
