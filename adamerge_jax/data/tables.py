"""Columns of the tables that examples are read from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adamerge_jax.errors import InputError
from adamerge_jax.recipes.schema import DataSource

if TYPE_CHECKING:
    import datasets


def texts_of(table: datasets.Dataset, column: str, source: DataSource, name: str) -> list[str]:
    """A column of texts.

    Args:
        table: That has the column.
        column: Its name.
        source: Where the table comes from, for the message.
        name: What error messages call these examples.

    Raises:
        InputError: A row holds something else.
    """
    texts = list(table[column])
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(
                f"{name}: {source.path}, row {row}: column {column!r} holds {text!r}, "
                "expected a text"
            )
    return texts


def no_column(
    table: datasets.Dataset, source: DataSource, name: str, expected: Sequence[str]
) -> InputError:
    """The error of a table that has none of the expected columns, which are given in words."""
    return InputError(
        f"{name}: {source.path} has no column {', or '.join(expected)}; "
        f"its columns are {', '.join(table.column_names)}"
    )
