"""The kind of data that a path names: decided from the files that are there, never guessed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from adamerge_jax.data.data_set_cards import read_card
from adamerge_jax.data.image_folders import IMAGE_SUFFIXES
from adamerge_jax.data.listing import files_below, in_words, require_no_split, split_of
from adamerge_jax.data.records import READERS as RECORD_READERS
from adamerge_jax.errors import InputError, in_one_line

if TYPE_CHECKING:
    from adamerge_jax.recipes.schema import DataSource

TABLE_KINDS = (*RECORD_READERS, ".parquet", ".arrow")
"""Endings of the files that hold a table; those of texts may be followed by one of `_PACKED`."""

_PACKED = (".gz", ".bz2", ".xz")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_SHARD = re.compile(r"(?P<name>.+?)-(?P<number>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?")

_MOST_DEPTHS = 2
"""Folders of any depth in a pattern of files: with each the time grows by all folders there are."""

_NO_TABLES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that tell of a data set and hold none of it."""


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A NumPy file of model inputs."""

    file: Path


@dataclasses.dataclass(frozen=True)
class TableFiles:
    """Files that together hold one table.

    Attributes:
        files: The files, of one kind, in the order of the rows.
        kind: One of `TABLE_KINDS`.
        examples: The number of rows that the data set's README.md tells, or None.
        class_names: The names of the classes that it tells, by column.
    """

    files: tuple[Path, ...]
    kind: str
    examples: int | None = None
    class_names: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SavedDataset:
    """A folder that `save_to_disk` of `datasets` has written."""

    folder: Path


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """A folder of image files."""

    folder: Path


@dataclasses.dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face Hub."""

    name: str


Location = Arrays | TableFiles | SavedDataset | ImageFolder | HubDataset


def is_on_hub(source: DataSource, root: Path) -> bool:
    """Returns whether data are a data set of the Hub: nothing is there, and it is no path's name.

    Args:
        source: The data source.
        root: Folder that relative paths start from.
    """
    path = root / Path(source.path).expanduser()
    if path.exists() or not _HUB_NAME.fullmatch(source.path):
        return False
    if source.revision is not None:
        return True
    first = PurePath(source.path).parts[0]
    in_a_folder = first != source.path and (root / first).is_dir()
    return not in_a_folder and _ending(path) not in (*IMAGE_SUFFIXES, ".npz", *_FILE_ENDINGS)


def locate_data(source: DataSource, root: Path) -> Location:
    """Returns the data that a source names.

    Args:
        source: The data source.
        root: Folder that relative paths start from.

    Raises:
        InputError: Nothing is there and it is no name of the Hub, or it is no data, or it may be
            more than one thing.
    """
    path = root / Path(source.path).expanduser()
    if is_on_hub(source, root):
        if Path(source.path).exists():
            raise InputError(
                f"{source.path} is in the current directory ({Path.cwd()}), where paths do not "
                "start; give its absolute path"
            )
        return HubDataset(source.path)
    if not path.exists():
        raise InputError(
            f"no such file or folder: {path}; give a file, a folder, or the id of a data set of "
            "the Hugging Face Hub (org/name, with its revision where a folder here has that name)"
        )
    if source.revision is not None:
        raise InputError(
            f"{path} is on this machine, so it has no revision {source.revision!r}; leave the "
            "revision out"
        )
    if path.is_dir():
        return _locate_in_folder(path, source)
    kind = table_kind(path)
    if path.suffix.lower() == ".npz":
        return Arrays(path)
    if kind is None:
        advice = (
            "give the folder of images"
            if path.suffix.lower() in IMAGE_SUFFIXES
            else (
                f"expected a file that ends in {', '.join((*TABLE_KINDS, '.npz'))} "
                f"(texts also with {', '.join(_PACKED)}), or a folder"
            )
        )
        raise InputError(f"{path} is no table: {advice}")
    require_no_split(path, source.split)
    return TableFiles((path,), kind)


def table_kind(file: PurePath) -> str | None:
    """Returns the kind of table that a file's name says it holds, in lower case; None for none."""
    ending = _ending(file)
    for packed in _PACKED:
        ending = ending.removesuffix(packed)
    if ending not in TABLE_KINDS or (ending not in RECORD_READERS and ending != _ending(file)):
        return None
    return ending


def _ending(file: PurePath) -> str:
    """Returns the ending of a file's name in lower case, as `.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    packed = len(suffixes) == 2 and suffixes[1] in _PACKED
    return "".join(suffixes if packed else suffixes[-1:])


_FILE_ENDINGS = (
    *TABLE_KINDS,
    *(kind + packed for kind in RECORD_READERS for packed in _PACKED),
    *(".zip", ".tar", ".gz", ".npy", ".pkl", ".xlsx", ".yaml"),
)


def _locate_in_folder(folder: Path, source: DataSource) -> Location:
    if (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    ):
        return SavedDataset(folder)
    card = read_card(folder)
    if card is not None and card.configs:
        patterns = card.files_of(source.config, source.split)
        files = [file for pattern in patterns for file in _matching(folder, pattern)]
        examples, class_names = card.facts_of(source.config, source.split)
        table = _one_table(files, f"README.md of {folder}: split {source.split!r}")
        return dataclasses.replace(table, examples=examples, class_names=class_names)
    if source.config is not None:
        if not (folder / source.config).is_dir():
            raise InputError(
                f"{folder} has no configuration {source.config!r}: neither its README.md nor a "
                "folder in it has that name"
            )
        folder = folder / source.config
    files = files_below(folder)
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    tables = [
        file
        for file in files
        if table_kind(file) is not None and file.name.lower() not in _NO_TABLES
    ]
    splits = {file: _split_of_table(file) for file in tables}
    with_split = [file for file, split in splits.items() if split is not None]
    if images and with_split and not any(file.stem.lower() == "metadata" for file in tables):
        raise InputError(
            f"{folder} holds images ({images[0]}) and tables ({with_split[0]}); give the folder of "
            "the images, or the file of the table"
        )
    if images:
        return ImageFolder(folder)
    if not tables:
        held = f"it holds {in_words(map(str, files))}" if files else "it is empty"
        raise InputError(f"{folder} holds neither tables nor images: {held}")
    if len(tables) == 1 and (None in splits.values() or "split" not in source.model_fields_set):
        return _one_table([folder / tables[0]], str(folder))
    if not with_split:
        raise InputError(
            f"{folder} holds several tables: {in_words(map(str, tables))}; give one of them"
        )
    wanted = split_of(source.split) or source.split
    chosen = [folder / file for file in with_split if splits[file] == wanted]
    if not chosen:
        named = in_words(sorted({split for split in splits.values() if split is not None}))
        raise InputError(
            f"{folder} has no split {source.split!r}; its tables are of {named}; give split"
        )
    return _one_table(chosen, f"{folder}: split {source.split!r}")


def _split_of_table(file: PurePath) -> str | None:
    """Returns the split that a table is of: its whole name, that of its shards, or its folder's."""
    name = file.name[: len(file.name) - len(_ending(file))]
    shard = _SHARD.fullmatch(name)
    of_name = split_of(shard["name"] if shard else name)
    return of_name or (split_of(file.parent.name) if file.parent.name else None)


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Returns the tables in a folder whose path fits a pattern, or lies in a folder that does."""
    if PurePath(pattern).is_absolute() or ".." in PurePath(pattern).parts or "://" in pattern:
        raise InputError(
            f"README.md of {folder} names {pattern!r:.80}, which is not in the folder; give "
            "the file"
        )
    try:
        if pattern.count("**") > _MOST_DEPTHS:
            raise ValueError(f"it has more than {_MOST_DEPTHS} **")
        fitting = sorted(folder.glob(pattern))
    except ValueError as error:
        raise InputError(
            f"README.md of {folder} names {pattern!r:.80}, which is no pattern of files "
            f"({in_one_line(error)}); give the file"
        ) from error
    return [
        file
        for path in fitting
        for file in ([path / name for name in files_below(path)] if path.is_dir() else [path])
        if table_kind(file) is not None
    ]


def _one_table(files: list[Path], where: str) -> TableFiles:
    """Returns the table that files make up; they must be of one kind, in one folder, all there."""
    files = list(dict.fromkeys(files))
    if not files:
        raise InputError(f"{where} has no table on this machine; give the file")
    kinds = {table_kind(file) for file in files}
    if len(kinds) > 1 or len({file.parent for file in files}) > 1:
        raise InputError(
            f"{where} is several tables: {in_words(map(str, files))}; give one of them, or config"
        )
    numbers: dict[str, tuple[int, set[int]]] = {}
    for file in files:
        if shard := _SHARD.fullmatch(file.name[: len(file.name) - len(_ending(file))]):
            count = int(shard["count"])
            numbers.setdefault(shard["name"], (count, set()))[1].add(int(shard["number"]))
    for name, (count, there) in numbers.items():
        if missing := sorted(set(range(count)) - there)[:1]:
            raise InputError(
                f"{where}: {name} is in {count} files, of which {len(there)} are there: number "
                f"{missing[0]} is missing; download all of them"
            )
    return TableFiles(tuple(files), kinds.pop())
