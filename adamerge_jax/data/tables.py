"""Tables that examples are read from: files, folders, data sets of the Hub."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from adamerge_jax.data.arrow_tables import (
    ArrowColumn,
    class_names_of,
    count_parquet,
    holds_images,
    read_arrow,
    read_parquet,
    require_sound,
)
from adamerge_jax.data.image_folders import list_images
from adamerge_jax.data.listing import split_of
from adamerge_jax.data.locations import (
    HubDataset,
    ImageFolder,
    Location,
    SavedDataset,
    TableFiles,
    table_kind,
)
from adamerge_jax.data.records import Record, read_records
from adamerge_jax.errors import InputError, in_one_line
from adamerge_jax.files.json_object import read_object

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

    from adamerge_jax.recipes.schema import DataSource

log = logging.getLogger(__name__)

Index = Int[np.ndarray, " N"]
Draw = Callable[[int], Index]
"""A function from the number of rows to the rows that are used, ascending."""

_MOST_CHARACTERS = 2**30
"""Characters of a column of texts, which are in memory: a small file may hold one text a million
times."""

_LARGEST_LABEL = np.iinfo(np.int32).max

_WHOLE_NUMBER = re.compile(r"[+-]?\d{1,30}")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows by column.

    Attributes:
        columns: The columns that were asked for and are there.
        column_names: The names of all columns.
        numbers: The number of each row in its file, from 0.
        class_names: The names of the classes of columns that hold class indices.
        images: The columns that hold images.
    """

    columns: Mapping[str, Sequence[Any]]
    column_names: Sequence[str]
    numbers: Sequence[int]
    class_names: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)
    images: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, column: str) -> Sequence[Any]:
        return self.columns[column]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of examples.

    Attributes:
        rows: The rows.
        source: The data source in the recipe, which names the columns.
        name: Name of the examples in error messages.
    """

    rows: Rows
    source: DataSource
    name: str

    @classmethod
    def of_rows(cls, records: Sequence[Record], source: DataSource, name: str) -> Table:
        """Makes a table of rows that are in memory."""
        wanted = dict.fromkeys(column for record in records for column in record)
        return cls(_rows_of_records(lambda: iter(records), wanted, None), source, name)

    @property
    def columns(self) -> set[str]:
        """Names of the columns."""
        return set(self.rows.column_names)

    def texts(self, column: str) -> list[str]:
        """Returns a column of texts.

        Raises:
            InputError: A row holds something else.
        """
        texts: list[str] = []
        size = 0
        for number, text in zip(self.rows.numbers, self.rows[column], strict=True):
            if not isinstance(text, str):
                raise InputError(
                    f"{self.name}: {self.source.path}, row {number}: column {column!r} holds "
                    f"{text!r:.60}, expected a text"
                )
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise InputError(
                    f"{self.name}: {self.source.path}, row {number}: column {column!r} holds half "
                    f"of a character, {text!a:.60}, which no text in UTF-8 does"
                )
            size += len(text)
            if size > _MOST_CHARACTERS:
                raise InputError(
                    f"{self.name}: {self.source.path}: column {column!r} has more than "
                    f"{_MOST_CHARACTERS:,} characters in its first {len(texts) + 1} rows; give "
                    "limit, the number of rows that are used"
                )
            texts.append(text)
        return texts

    def lacks(self, expected: Sequence[str]) -> InputError:
        """Returns the error of a table that has none of the columns expected, given in words."""
        names = list(self.rows.column_names)
        advice = ""
        if len(names) == 1 and any(separator in names[0] for separator in ";\t|"):
            advice = "; a .csv file separates columns by commas, a .tsv file by tabs"
        return InputError(
            f"{self.name}: {self.source.path} has no column {', or '.join(expected)}; "
            f"its columns are {', '.join(names)}{advice}"
        )

    def require_rows(self, preprocessor: Any, kind: str) -> None:
        """Refuses an empty table, and one that the models bring no preprocessor for.

        Args:
            preprocessor: The tokenizer or image processor, or None.
            kind: Its name in the error message.
        """
        if not len(self.rows):
            raise InputError(f"{self.name}: {self.source.path} has no examples")
        if preprocessor is None:
            raise InputError(
                f"{self.name}: neither the base nor an expert comes with a {kind}; save one"
            )


def read_table(
    location: Location,
    source: DataSource,
    name: str,
    wanted: Sequence[str],
    draw: Draw | None = None,
) -> Table:
    """Reads a table.

    Only the chosen rows of the wanted columns are kept in memory; images stay on the disk.

    Args:
        location: The place of the table.
        source: The data source.
        name: Name of the examples in error messages.
        wanted: The columns that are read, as far as they are there.
        draw: The function that chooses rows; None for all.

    Raises:
        InputError: It cannot be read.
    """
    try:
        if isinstance(location, TableFiles):
            rows = _read_files(location, source, wanted, draw)
        elif isinstance(location, ImageFolder):
            rows = _read_image_folder(location.folder, source, draw)
        elif isinstance(location, SavedDataset):
            rows = _arrow_rows(_load_saved(location.folder, source), wanted, draw)
        else:
            rows = _arrow_rows(_load_from_hub(location, source), wanted, draw)
        return Table(rows, source, name)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:  # `datasets` raises its own, pyarrow's, the Hub's and OS errors
        where = (
            f"{source.path} is no file here, and the data set of the Hub"
            if isinstance(location, HubDataset)
            else source.path
        )
        raise InputError(f"{name}: {where} cannot be read: {in_one_line(error)}") from error


def class_indices(
    values: Sequence[Any], numbers: Sequence[int], source: DataSource, name: str
) -> Int[np.ndarray, " N"]:
    """Returns the class indices that a column or array of labels holds.

    Args:
        values: The labels.
        numbers: The number of each row in its file.
        source: The data source.
        name: Name of the examples in error messages.

    Raises:
        InputError: A value is no whole number from 0 to 2,147,483,647.
    """
    for row, value in zip(numbers, values, strict=True):
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or not 0 <= value <= _LARGEST_LABEL
        ):
            raise InputError(
                f"{name}: label column {source.label!r} of {source.path} must hold class indices "
                f"0, 1, ..., or names of classes in every row; row {row} holds {value!r:.60}"
            )
    return np.array(values, np.int32)


def _read_files(
    location: TableFiles, source: DataSource, wanted: Sequence[str], draw: Draw | None
) -> Rows:
    for file in location.files:
        if not file.stat().st_size:
            raise InputError(f"{file} has no examples: it is an empty file")
    if location.kind == ".arrow":
        rows = _arrow_rows(read_arrow(location.files), wanted, draw)
    elif location.kind == ".parquet":
        size = count_parquet(location.files)
        index = None if draw is None else draw(size)
        table, names = read_parquet(location.files, wanted, index)
        rows = dataclasses.replace(
            _arrow_rows(table, wanted, None),
            column_names=names,
            numbers=range(size) if index is None else index.tolist(),
        )
    else:

        def records() -> Iterator[Record]:
            for file in location.files:
                yield from read_records(file, location.kind)

        rows = _rows_of_records(records, wanted, draw)
        if location.kind == ".tsv":
            _require_no_swallowed_rows(rows, location.files[0])
        if location.kind in (".csv", ".tsv") and source.label in rows.columns:
            numbers = [_number(cell) for cell in rows[source.label]]
            rows = dataclasses.replace(rows, columns=dict(rows.columns) | {source.label: numbers})
    if draw is None and location.examples not in (None, len(rows)):
        log.warning(
            "%s has %d rows, the README.md of the data set tells of %d",
            source.path,
            len(rows),
            location.examples,
        )
    return dataclasses.replace(rows, class_names={**location.class_names, **rows.class_names})


def _rows_of_records(
    records: Callable[[], Iterator[Record]], wanted: Iterable[str], draw: Draw | None
) -> Rows:
    """Collects the wanted columns of rows; what a row lacks is None."""
    chosen = None
    if draw is not None:
        chosen = draw(sum(1 for _ in records())).tolist()
    columns: dict[str, list[Any]] = {name: [] for name in wanted}
    names: dict[str, None] = {}
    remaining = None if chosen is None else set(chosen)
    size = 0
    for row, record in enumerate(records()):
        size += 1
        names.update(dict.fromkeys(record))
        if remaining is None or row in remaining:
            for name, values in columns.items():
                values.append(record.get(name))
    columns = {name: values for name, values in columns.items() if name in names}
    return Rows(columns, list(names), range(size) if chosen is None else chosen)


def _read_image_folder(folder: Path, source: DataSource, draw: Draw | None) -> Rows:
    """Lists the images of a folder, with the columns of their table or the classes of folders."""
    listed = list_images(folder, source)
    if listed.metadata is not None:
        return _images_of_metadata(listed.metadata, listed.files, source, draw)
    chosen = range(len(listed.files)) if draw is None else draw(len(listed.files)).tolist()
    columns: dict[str, Sequence[Any]] = {source.image: [listed.files[row] for row in chosen]}
    if listed.labels is None or listed.class_names is None:
        return Rows(columns, list(columns), chosen, images=frozenset(columns))
    columns["label"] = [listed.labels[row] for row in chosen]
    return Rows(
        columns, list(columns), chosen, {"label": listed.class_names}, frozenset({source.image})
    )


def _images_of_metadata(
    metadata: Path, files: Sequence[Path], source: DataSource, draw: Draw | None
) -> Rows:
    """Reads the table of a folder of images, whose column `file_name` names them."""
    wanted = ["file_name", *([source.label] if source.label else [])]
    location = TableFiles((metadata,), table_kind(metadata))
    rows = _read_files(location, source, wanted, draw)
    if "file_name" not in rows.column_names:
        raise InputError(f"{metadata} has no column 'file_name', which names the images")
    there = {file: file for file in files}
    images = []
    for number, name in zip(rows.numbers, rows["file_name"], strict=True):
        file = there.get(metadata.parent / str(name))
        if file is None:
            raise InputError(
                f"{metadata}, row {number}: there is no image {name!r:.80} in {metadata.parent}"
            )
        images.append(file)
    if draw is None and len(set(images)) < len(files):
        log.warning(
            "%s names %d of the %d images in its folder; the others are left out",
            metadata,
            len(set(images)),
            len(files),
        )
    return dataclasses.replace(
        rows,
        columns=dict(rows.columns) | {source.image: images},
        column_names=[source.image, *rows.column_names],
        images=frozenset({source.image}),
    )


def _arrow_rows(table: pa.Table, wanted: Iterable[str], draw: Draw | None) -> Rows:
    """Takes rows of an Arrow table as they are needed."""
    present = [name for name in dict.fromkeys(wanted) if name in table.column_names]
    require_sound(table, present)
    index = None if draw is None else draw(len(table))
    return Rows(
        {name: ArrowColumn(table[name], index) for name in present},
        table.column_names,
        range(len(table)) if index is None else index.tolist(),
        class_names_of(table.schema),
        frozenset(name for name in present if holds_images(table.schema.field(name).type)),
    )


def _load_saved(folder: Path, source: DataSource) -> pa.Table:
    """Loads a folder of `save_to_disk`, or the split of several."""
    if (folder / "dataset_dict.json").is_file():
        splits = read_object(folder / "dataset_dict.json").get("splits", [])
        wanted = split_of(source.split) or source.split
        fitting = [split for split in splits if source.split == split] or [
            split for split in splits if split_of(split) == wanted
        ]
        if len(fitting) != 1 or Path(fitting[0]).name != fitting[0]:
            raise InputError(
                f"{folder} has no split {source.split!r}; its splits are {', '.join(splits)}"
            )
        folder = folder / fitting[0]
    # Read here: `datasets` takes the names for paths, and writes beside the files that it reads.
    names = [fields.get("filename") for fields in read_object(folder / "state.json")["_data_files"]]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise InputError(
                f"state.json of {folder} names {name!r:.80}, which is no file in the folder; copy "
                "or download it again"
            )
    return read_arrow([folder / name for name in names])


def _load_from_hub(location: HubDataset, source: DataSource) -> pa.Table:
    import datasets

    with _without_progress_bars():
        return _arrow_of(
            datasets.load_dataset(
                location.name, source.config, split=source.split, revision=source.revision
            )
        )


def _arrow_of(rows: datasets.Dataset) -> pa.Table:
    """Returns the table of a data set, of which it may show only some rows."""
    table = rows.flatten_indices().data.table
    return table.replace_schema_metadata(rows.features.arrow_schema.metadata)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    import datasets

    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _number(cell: Any) -> Any:
    """Returns the whole number that a cell of a text file holds, or the cell."""
    return int(cell) if isinstance(cell, str) and _WHOLE_NUMBER.fullmatch(cell) else cell


def _require_no_swallowed_rows(rows: Rows, file: Path) -> None:
    """Refuses a table in which a lone quotation mark has made one text of several rows.

    Many .tsv files quote nothing, so that a text may begin with one.
    """
    for column, texts in rows.columns.items():
        for number, text in zip(rows.numbers, texts, strict=True):
            if text is not None and "\t" in text and "\n" in text:
                raise InputError(
                    f"{file}, row {number}: column {column!r} holds a text with a tab and a "
                    f"line break, {text!r:.60}: most likely several rows, since a quotation mark "
                    "at its beginning is not closed; write the file as .jsonl, or put texts with "
                    "quotation marks in quotes and double the marks within"
                )
