"""The first rows of data, whatever file or folder they are in."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adamerge_jax.data.locations import Arrays, TableFiles, locate_data
from adamerge_jax.data.records import READERS, read_records
from adamerge_jax.data.tables import read_table
from adamerge_jax.drafting.data_files import Data
from adamerge_jax.errors import InputError, in_hand, in_one_line
from adamerge_jax.recipes.schema import DataSource

SHOWN = 200
"""Number of rows whose values are looked at."""

MANY = 2000
"""A number of rows from which on there are many."""


class Sample(NamedTuple):
    """The first rows.

    Attributes:
        columns: Values by column; of images and arrays none.
        images: Names of the columns that hold images.
        class_names: Names of the classes of columns that hold class indices.
        is_many: True if there are more rows than `MANY`.
        arrays: True if the columns are arrays of model inputs.
    """

    columns: Mapping[str, Sequence[Any]]
    images: frozenset[str] = frozenset()
    class_names: Mapping[str, list[str]] = {}
    is_many: bool = False
    arrays: bool = False

    def texts(self) -> list[str]:
        """Returns the names of columns whose values are all texts."""
        return [
            name
            for name, values in self.columns.items()
            if values and all(isinstance(value, str) for value in values)
        ]


def read_sample(data: Data) -> Sample:
    """Reads the first rows of data on this machine.

    Raises:
        InputError: They cannot be read.
    """
    split = {} if data.split is None else {"split": data.split}
    source = DataSource(path=str(Path(data.path).absolute()), **split)
    with in_hand(source.path):
        location = locate_data(source, Path())
        if isinstance(location, Arrays):
            return _of_arrays(location.file)
        if isinstance(location, TableFiles) and location.kind in READERS:
            return _of_records(location)
        table = read_table(location, source, data.path, [])
        names = list(table.rows.column_names)
        rows = read_table(
            location, source, data.path, names, lambda size: np.arange(min(size, SHOWN))
        ).rows
        images = rows.images
        return Sample(
            {name: [] if name in images else list(rows[name]) for name in names},
            images,
            rows.class_names,
            len(table.rows) > MANY,
        )


def _of_records(location: TableFiles) -> Sample:
    columns: dict[str, list[Any]] = {}
    count = 0
    for file in location.files:
        for record in islice(read_records(file, location.kind), MANY + 1 - count):
            count += 1
            if count <= SHOWN:
                for name, value in record.items():
                    columns.setdefault(name, []).append(value)
    return Sample(columns, class_names=location.class_names, is_many=count > MANY)


def _of_arrays(file: Path) -> Sample:
    """Lists the arrays of a NumPy file; their values stay there."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = [Path(name).stem for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{file} is no readable .npz file ({in_one_line(error)})") from error
    return Sample({name: [] for name in names}, arrays=True)
