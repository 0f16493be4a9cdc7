"""Tables that examples are read from: files, folders of images, data sets of the Hub."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from adamerge_jax.errors import InputError

if TYPE_CHECKING:
    import datasets

    from adamerge_jax.recipes.schema import DataSource

READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
"""The reader of `datasets` for each kind of file."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of examples.

    Attributes:
        rows: The rows.
        source: The data source in the recipe, which names the columns.
        name: Name of the examples in error messages.
    """

    rows: datasets.Dataset
    source: DataSource
    name: str

    @property
    def columns(self) -> set[str]:
        """Names of the columns."""
        return set(self.rows.column_names)

    def texts(self, column: str) -> list[str]:
        """Returns a column of texts.

        Raises:
            InputError: A row holds something else.
        """
        texts = list(self.rows[column])
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(
                    f"{self.name}: {self.source.path}, row {row}: column {column!r} holds "
                    f"{text!r}, expected a text"
                )
        return texts

    def lacks(self, expected: Sequence[str]) -> InputError:
        """Returns the error of a table that has none of the columns expected, given in words."""
        return InputError(
            f"{self.name}: {self.source.path} has no column {', or '.join(expected)}; "
            f"its columns are {', '.join(self.rows.column_names)}"
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


def is_on_hub(source: DataSource, root: Path) -> bool:
    """Returns whether data are a data set of the Hub, rather than a file or a folder.

    Args:
        source: The data source.
        root: Folder that relative paths start from.
    """
    path = root / Path(source.path).expanduser()
    return not path.is_dir() and path.suffix not in (*READERS, ".npz")


def read_table(path: Path, source: DataSource, name: str) -> Table:
    """Reads a file, a folder of images, or a data set of the Hub.

    Args:
        path: The file or folder, if it is one.
        source: The data source.
        name: Name of the examples in error messages.

    Raises:
        InputError: It cannot be found or read.
    """
    import datasets

    shows_progress = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    # `datasets` takes paths as patterns.
    exactly = glob.escape(str(path))
    try:
        if path.is_dir():
            rows = datasets.load_dataset("imagefolder", data_dir=exactly, split=source.split)
        elif path.suffix in READERS:
            rows = _read_file(path, exactly, name)
        else:
            rows = datasets.load_dataset(source.path, source.config, split=source.split)
        return Table(rows, source, name)
    except InputError:
        raise
    except Exception as error:  # `datasets` raises its own, pyarrow's, the Hub's and OS errors
        reason = " ".join(str(error).split()) or type(error).__name__
        where = path if path.exists() else f"{path} is no file, and data set {source.path!r}"
        raise InputError(f"{name}: {where} cannot be read: {reason}") from error
    finally:
        if shows_progress:
            datasets.enable_progress_bars()


def class_indices(values: Sequence[Any], source: DataSource, name: str) -> Int[np.ndarray, " N"]:
    """Returns the class indices that a column or array of labels holds.

    Raises:
        InputError: A value is no whole number of at least 0.
    """
    values = list(values)
    wrong = [
        row
        for row, value in enumerate(values)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0
    ]
    if wrong:
        # One empty cell of a CSV file makes texts of all numbers in its column.
        row = next((row for row in wrong if values[row] == ""), wrong[0])
        raise InputError(
            f"{name}: label column {source.label!r} of {source.path} must hold class indices "
            f"0, 1, ...; row {row} holds {values[row]!r}"
        )
    return np.array(values, np.int32)


def _read_file(path: Path, exactly: str, name: str) -> datasets.Dataset:
    import datasets

    if not path.is_file():
        raise InputError(f"{name}: no such file: {path}")
    if not path.stat().st_size:
        raise InputError(f"{name}: {path} has no examples: it is an empty file")
    reader = READERS[path.suffix]
    # `None`, `NA` and `nan` are texts too.
    options: dict[str, Any] = {"keep_default_na": False} if reader == "csv" else {}
    if path.suffix == ".tsv":
        options["sep"] = "\t"
    rows = datasets.load_dataset(reader, data_files=exactly, split="train", **options)
    if path.suffix == ".tsv":
        _require_no_swallowed_rows(rows, path, name)
    return rows


def _require_no_swallowed_rows(rows: datasets.Dataset, path: Path, name: str) -> None:
    """Refuses a table in which a lone quotation mark has made one text of several rows.

    Many .tsv files quote nothing, so that a text may begin with one. All columns count: rows are
    lost whichever it is.
    """
    for column in rows.column_names:
        for row, text in enumerate(rows[column]):
            if isinstance(text, str) and "\t" in text and "\n" in text:
                raise InputError(
                    f"{name}: {path}, row {row}: column {column!r} holds a text with a tab and a "
                    f"line break, {text!r:.60}: most likely several rows, since a quotation mark "
                    "at its beginning is not closed; write the file as .jsonl, or put texts with "
                    "quotation marks in quotes and double the marks within"
                )
