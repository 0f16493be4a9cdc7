"""Labels of experts that give numbers, or any number of labels, for an example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from adamerge_jax.data.examples import Examples
from adamerge_jax.errors import InputError, shorten
from adamerge_jax.models.problem import NUMBERS, Problem


class LabelColumn(NamedTuple):
    """A column of labels.

    Attributes:
        values: The value of each row.
        numbers: The number of each row in its file, for messages.
        name: The column.
        where: The beginning of messages: the examples and their file.
    """

    values: Sequence[Any]
    numbers: Sequence[int]
    name: str
    where: str

    def error(self, row: int, expected: str) -> InputError:
        """Returns the error of a row that holds something else."""
        return InputError(
            f"{self.where}, row {self.numbers[row]}: {self.name!r} is "
            f"{shorten(repr(self.values[row]))}; expected {expected}"
        )


def give_labels(
    examples: Examples,
    column: LabelColumn,
    problem: Problem,
    outputs: int,
    class_names: Sequence[str] | None = None,
) -> None:
    """Gives examples the labels of a column, for the problems NUMBERS and LABELS.

    Args:
        examples: The examples.
        column: The column.
        problem: The problem that the task's head solves.
        outputs: The number of outputs of that head.
        class_names: The names of the classes in the data; None where they have none.

    Raises:
        InputError: A row holds something else.
    """
    if problem == NUMBERS:
        examples.labels = numbers_of(column, outputs)
        return
    examples.by_class = True
    examples.labels, examples.class_names = labels_of(column, outputs, class_names)
    # The order of names in the rows says nothing.
    are_sorted = examples.class_names is not None and class_names is None
    examples.names_have_order = not are_sorted


def numbers_of(column: LabelColumn, outputs: int) -> Float[np.ndarray, "N R"]:
    """Returns the numbers that a column holds, float32.

    Args:
        column: The column.
        outputs: R, the numbers that the expert gives for an example.

    Raises:
        InputError: A row has no number, or not R of them.
    """
    expected = "a number" if outputs == 1 else f"a list of {outputs} numbers"
    numbers = np.empty((len(column.values), outputs), np.float32)
    for row, value in enumerate(column.values):
        given = value if isinstance(value, list) else [value]
        if len(given) != outputs:
            raise column.error(row, expected)
        for position, member in enumerate(given):
            try:
                number = np.nan if isinstance(member, bool) else float(member)
            except (TypeError, ValueError, OverflowError):
                number = np.nan
            with np.errstate(over="ignore"):
                numbers[row, position] = number
        if not np.isfinite(numbers[row]).all():
            raise column.error(row, expected)
    return numbers


def labels_of(
    column: LabelColumn, outputs: int, class_names: Sequence[str] | None
) -> tuple[Int[np.ndarray, "N C"], list[str] | None]:
    """Returns 1 for each label that a row of a column has, and 0 for the others.

    Rows are lists of classes, by number or by name, or of 0 and 1 for each class: these if all are
    of the expert's C classes and hold nothing else.

    Args:
        column: The column.
        outputs: C, the classes of the expert.
        class_names: The names of the classes in the data; None where they have none.

    Returns:
        The labels, and the names of their classes, which are sorted where rows hold names.

    Raises:
        InputError: A row holds something else.
    """
    expected = f"a list of classes, or of 0 or 1 for each of the {outputs} classes"
    rows = [_row(column, row, expected) for row in range(len(column.values))]
    if all(len(row) == outputs and all(_is_truth(value) for value in row) for row in rows):
        return np.array([[int(value) for value in row] for row in rows], np.int32), None
    if all(isinstance(value, str) and value.strip() for row in rows for value in row):
        names = sorted({value for row in rows for value in row})
        if len(names) > outputs:
            raise InputError(
                f"{column.where}: column {column.name!r} has {len(names)} classes, the task's head "
                f"has {outputs}; check that data and expert belong together"
            )
        places = {name: place for place, name in enumerate(names)}
        rows = [[places[value] for value in row] for row in rows]
        count = len(names)
    else:
        names, count = class_names and list(class_names), outputs
        if names is not None:
            count = len(names)
    labels = np.zeros((len(rows), count), np.int32)
    for number, row in enumerate(rows):
        for value in row:
            is_index = isinstance(value, int) and not isinstance(value, bool)
            if not is_index or not 0 <= value < count:
                raise column.error(number, f"{expected}, which are 0 to {count - 1}")
            labels[number, value] = 1
    return labels, names


def _row(column: LabelColumn, row: int, expected: str) -> list[Any]:
    value = column.values[row]
    if not isinstance(value, list):
        raise column.error(row, expected)
    return value


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool | int | float) and value in (0, 1)
