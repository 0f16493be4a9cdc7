"""Folders of images: the files of a split, and the classes that folders name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, NamedTuple

from adamerge_jax.data.listing import files_below, in_words, require_no_split, split_of
from adamerge_jax.errors import InputError, and_more

if TYPE_CHECKING:
    from adamerge_jax.recipes.schema import DataSource

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".tga", ".ico", ".pcx"),
    *(".jp2", ".j2k", ".jpf", ".jpx"),
)
"""Endings of image files, in lower case."""

METADATA = ("metadata.jsonl", "metadata.csv")
"""Names of the tables that a folder of images may have of them, with a column `file_name`."""

_EXPECTED = "images in folders named by class, below folders named by split if there are some"


class ListedImages(NamedTuple):
    """The images of a split.

    Attributes:
        files: The files, sorted.
        class_names: The names of the folders that they are in, sorted; None without such folders.
        labels: The class of each file.
        metadata: The table with a row for each file, or None.
    """

    files: list[Path]
    class_names: list[str] | None
    labels: list[int] | None
    metadata: Path | None


def list_images(folder: Path, source: DataSource) -> ListedImages:
    """Lists the images of a folder.

    They are in it, in a folder for each class, or either below a folder for each split. The folders
    at the top are splits if all have names of splits (train, validation, test and the like), or if
    there are further folders in them.

    Args:
        folder: The folder.
        source: The data source, with the split.

    Raises:
        InputError: The images lie otherwise, or there is no such split.
    """
    files = files_below(folder)
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    top = sorted({image.parts[0] for image in images if len(image.parts) > 1})
    split: PurePath | None = None
    deep = max(len(image.parts) for image in images)
    if top and (all(split_of(name) for name in top) or (deep > 2 and source.split in top)):
        split = PurePath(_chosen_split(top, folder, source))
        images = [image for image in images if image.parts[0] == str(split)]
        files = [file for file in files if file.parts[0] == str(split)]
    else:
        require_no_split(folder, source.split)
    below = [image.relative_to(split or "") for image in images]
    depths = {len(image.parts): image for image in below}
    tables = [file for file in files if file.name.lower() in METADATA]
    if len(tables) > 1:
        raise InputError(f"{folder} holds {in_words(map(str, tables))}; expected one table")
    if not tables and (len(depths) > 1 or max(depths) > 2):
        raise InputError(
            f"{folder}: images lie in {in_words(str(depths[depth]) for depth in sorted(depths))}; "
            f"expected {_EXPECTED}; give another folder"
        )
    _tell_left_out(folder, [file for file in files if file not in {*images, *tables}])
    paths = [folder / image for image in images]
    if tables or max(depths) == 1:
        return ListedImages(paths, None, None, folder / tables[0] if tables else None)
    class_names = sorted({image.parts[0] for image in below})
    _tell_numbers(folder, class_names)
    indices = {name: index for index, name in enumerate(class_names)}
    return ListedImages(paths, class_names, [indices[image.parts[0]] for image in below], None)


def _chosen_split(top: Sequence[str], folder: Path, source: DataSource) -> str:
    if source.split in top:
        return source.split
    wanted = split_of(source.split)
    fitting = [name for name in top if wanted is not None and split_of(name) == wanted]
    if len(fitting) == 1:
        return fitting[0]
    raise InputError(
        f"{folder} has no folder for split {source.split!r}; its folders are {in_words(top)}; give "
        "one of them as split"
    )


def _tell_left_out(folder: Path, files: Sequence[PurePath]) -> None:
    if files:
        log.warning("%s: no image and left out: %s%s", folder, files[0], and_more(len(files) - 1))


def _tell_numbers(folder: Path, class_names: Sequence[str]) -> None:
    """Warns of names that are numbers and sorted as texts, so that 10 comes before 2."""
    if all(name.isdecimal() for name in class_names) and class_names != sorted(
        class_names, key=int
    ):
        wrong = next(name for at, name in enumerate(class_names) if int(name) != at)
        log.warning(
            "%s: folders named by numbers are sorted as texts: the folder %r is class %d",
            folder,
            wrong,
            list(class_names).index(wrong),
        )
