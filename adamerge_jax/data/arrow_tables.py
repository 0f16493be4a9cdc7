"""Tables of Arrow and Parquet files, read through memory maps."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from adamerge_jax.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as parquet

_LFS_POINTER = b"version https://git-lfs"

_ROWS_AT_ONCE = 256
"""Rows of a Parquet file that are in memory at a time: they may be images."""

_BYTES_AT_ONCE = 2**29
"""Bytes of these rows, where every one of them holds the largest value of the file."""

_MOST_GROWTH = 100
"""The number of times that a file may be larger without compression, if it is then larger than
`_BYTES_AT_ONCE`."""

_ROWS_OF_A_BYTE, _USUAL_ROWS = 8, 2**24
"""Rows of a byte of a file, and the number of rows that any file may have: a file of a hundred
bytes can say that a value stands in a billion rows."""


class ArrowColumn(Sequence[Any]):
    """A column of which a value becomes a Python object when it is taken."""

    def __init__(self, column: pa.ChunkedArray, index: Int[np.ndarray, " N"] | None = None):
        """Takes a column, and the rows of it that count."""
        self._column = column
        self._index = index

    def __len__(self) -> int:
        return len(self._column) if self._index is None else len(self._index)

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self._column[row if self._index is None else int(self._index[row])].as_py()

    def __iter__(self) -> Iterator[Any]:
        if self._index is not None:
            yield from (self[row] for row in range(len(self)))
            return
        # A value that stands in many rows is in memory once, and becomes an object in each.
        rows_at_once = 1 if _holds_values_once(self._column.type) else _ROWS_AT_ONCE
        for chunk in self._column.chunks:
            for batch in range(0, len(chunk), rows_at_once):
                yield from chunk.slice(batch, rows_at_once).to_pylist()


def read_arrow(files: Sequence[Path]) -> pa.Table:
    """Opens Arrow files, of the stream's format or the file's, as one table that stays on disk."""
    import pyarrow as pa

    tables = []
    for file in files:
        _require_content(file)
        source = pa.memory_map(str(file))
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        tables.append(reader.read_all())
    table = pa.concat_tables(tables)
    _require_rows_of_size(len(table), files)
    return table


def count_parquet(files: Sequence[Path]) -> int:
    """Returns the number of rows of Parquet files."""
    import pyarrow.parquet as parquet

    for file in files:
        _require_content(file)
    rows = sum(parquet.ParquetFile(file).metadata.num_rows for file in files)
    _require_rows_of_size(rows, files)
    return rows


def read_parquet(
    files: Sequence[Path], wanted: Sequence[str], index: Int[np.ndarray, " N"] | None
) -> tuple[pa.Table, list[str]]:
    """Reads rows of Parquet files into a temporary file, from which they are taken.

    A Parquet file has to be decompressed from the beginning of a part of it, so that no single
    row, an image for example, can be taken from it.

    Args:
        files: The files, with the same columns.
        wanted: The columns to read, as far as the files have them.
        index: The rows to read, ascending; None for all.

    Returns:
        The table, and the names of all columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    schema = parquet.read_schema(files[0])
    _require_unique(schema.names)
    chosen = [name for name in wanted if name in schema.names]
    chosen_schema = pa.schema([schema.field(name) for name in chosen], metadata=schema.metadata)
    repeated = [name for name in chosen if not _holds_values_once(schema.field(name).type)]
    most_bytes = max(_BYTES_AT_ONCE, _MOST_GROWTH * _size(files))
    with tempfile.NamedTemporaryFile(suffix=".arrow") as spill:
        with pa.ipc.new_file(spill, chosen_schema) as writer:
            first = 0
            for file in files:
                reader = parquet.ParquetFile(file, memory_map=True)
                rows_at_once = _rows_at_once(reader.metadata, repeated)
                for batch in reader.iter_batches(rows_at_once, columns=chosen):
                    rows = batch.select(chosen)
                    if index is not None:
                        begin, end = np.searchsorted(index, [first, first + len(batch)])
                        rows = rows.take(pa.array(index[begin:end] - first))
                    first += len(batch)
                    if len(rows):
                        writer.write_batch(rows.cast(chosen_schema))
                    if spill.tell() > most_bytes:
                        raise InputError(
                            f"{file} is more than {_MOST_GROWTH} times as large without "
                            "compression, which no data is; download it again"
                        )
        spill.flush()
        # The map outlives the name of the file, and the file goes with it.
        return pa.ipc.open_file(pa.memory_map(spill.name)).read_all(), schema.names


def _rows_at_once(metadata: parquet.FileMetaData, columns: Sequence[str]) -> int:
    """Returns the number of rows that can be in memory, whichever values of the file they hold.

    A value that stands in many rows is stored once, so that a small file may hold any amount of
    text. A part of a column is at least as large as the largest value in it.
    """
    largest = 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for place in range(group.num_columns):
            part = group.column(place)
            if part.path_in_schema.partition(".")[0] in columns:
                largest = max(largest, part.total_uncompressed_size)
    return min(_ROWS_AT_ONCE, max(1, _BYTES_AT_ONCE // largest))


def _require_rows_of_size(rows: int, files: Sequence[Path]) -> None:
    """Refuses files that say that they have far more rows than bytes."""
    if rows > max(_USUAL_ROWS, _ROWS_OF_A_BYTE * _size(files)):
        raise InputError(
            f"{files[0]} says that it has {rows:,} rows in {_size(files):,} bytes, which no data "
            "has; download it again"
        )


def _size(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def class_names_of(schema: pa.Schema) -> dict[str, list[str]]:
    """Returns the names of the classes that `datasets` has written into a schema, by column."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    import datasets

    features = datasets.Features.from_arrow_schema(schema)
    names = {}
    for column, feature in features.items():
        if isinstance(feature, list) and feature:
            feature = feature[0]
        feature = getattr(feature, "feature", feature)  # of a list of classes
        if isinstance(feature, datasets.ClassLabel):
            names[column] = list(feature.names)
    return names


def _holds_values_once(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind))


def holds_images(kind: pa.DataType) -> bool:
    """Returns whether values of a type may be images: bytes, or bytes and a path."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else pa.null()
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def require_sound(table: pa.Table, wanted: Sequence[str]) -> None:
    """Refuses columns whose offsets or texts are damaged: reading them could end the process."""
    _require_unique(table.column_names)
    table.select([name for name in wanted if name in table.column_names]).validate(full=True)


def _require_unique(names: Sequence[str]) -> None:
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise InputError(f"it has the column {twice!r} twice")


def _require_content(file: Path) -> None:
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise InputError(
                f"{file} is a pointer of Git LFS, not the file itself; run `git lfs pull` in its "
                "repository"
            )
