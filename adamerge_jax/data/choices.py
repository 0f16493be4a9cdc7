"""Examples of several texts, one of which is right: the data of multiple choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from adamerge_jax.data.examples import Cut, Examples
from adamerge_jax.data.tables import Table
from adamerge_jax.data.texts import TextExamples
from adamerge_jax.data.token_limits import TokenLimits
from adamerge_jax.errors import InputError, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MOST_CHOICES = 256
"""The largest number of choices of an example, each of which is a text of a batch."""


class ChoiceExamples(Examples):
    """Examples of N texts each, `[examples, N, T]`.

    Attributes:
        labels: The number of the right choice, from 0; None where there are none.
    """

    def __init__(self, choices: Sequence[TextExamples]):
        """Puts texts of one tokenizer side by side.

        Args:
            choices: The first choice of each example, the second one, and so on.
        """
        self.choices = choices
        cuts = [texts.cut for texts in choices if texts.cut is not None]
        if cuts:
            self.cut = Cut(np.any([cut.examples for cut in cuts], axis=0), cuts[0].max_length)

    def __len__(self) -> int:
        return len(self.choices[0])

    def padded_length(self, index: Int[np.ndarray, " B"]) -> int:
        """Returns the tokens that all choices of chosen examples are padded to."""
        return max(texts.padded_length(index) for texts in self.choices)

    def take(self, index: Int[np.ndarray, " B"], length: int) -> dict[str, np.ndarray]:
        """Returns the inputs of chosen examples, `[B, N, T]` each."""
        taken = [texts.take(index, length) for texts in self.choices]
        return {name: np.stack([inputs[name] for inputs in taken], axis=1) for name in taken[0]}


def choice_examples(
    table: Table,
    text: Sequence[str],
    choices: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    limits: TokenLimits | None,
) -> ChoiceExamples:
    """Makes examples of a table with a text and its choices in each row.

    A choice is read behind the text, as the second one of a pair.

    Args:
        table: The table; the label's column of its source has the number of the right choice, from
            0, or its letter.
        text: The column of the text; a second one stands before each choice.
        choices: The column of lists of choices, or a column for each choice.
        tokenizer: The tokenizer.
        max_length: Longest text in tokens, with a choice.
        limits: The limits of the model's tokens; None for any.

    Raises:
        InputError: A row has no choices, or not as many as the first one.
    """
    if isinstance(choices, str):
        rows = _lists_of_choices(table, choices)
    else:
        rows = [list(row) for row in zip(*map(table.texts, choices), strict=True)]
    first, *second = (table.texts(column) for column in text)
    beginnings = second[0] if second else [""] * len(first)
    sides = []
    for choice in range(len(rows[0])):
        behind = [
            f"{beginning} {row[choice]}" if beginning else row[choice]
            for beginning, row in zip(beginnings, rows, strict=True)
        ]
        pairs = list(zip(first, behind, strict=True))
        sides.append(TextExamples(pairs, tokenizer, max_length, table.name, limits))
    examples = ChoiceExamples(sides)
    label = table.source.label
    if label is not None:
        given = zip(table.rows.numbers, table.rows[label], strict=True)
        numbers = [_number_of_choice(value, len(sides)) for _, value in given]
        if None in numbers:
            row = numbers.index(None)
            raise InputError(
                f"{table.name}: {table.source.path}, row {table.rows.numbers[row]}: {label!r} is "
                f"{shorten(repr(table.rows[label][row]))}; expected the number of the right "
                f"choice, 0 to {len(sides) - 1}, or its letter"
            )
        examples.labels = np.array(numbers, np.int32)
    return examples


def _lists_of_choices(table: Table, column: str) -> list[list[str]]:
    """Returns the choices of each row, as many in each."""
    rows = list(table.rows[column])
    for number, row in zip(table.rows.numbers, rows, strict=True):
        where = f"{table.name}: {table.source.path}, row {number}: column {column!r}"
        if not isinstance(row, list) or not all(isinstance(choice, str) for choice in row):
            raise InputError(f"{where} holds {row!r:.60}, expected a list of texts")
        if not 2 <= len(row) <= MOST_CHOICES or len(row) != len(rows[0]):
            raise InputError(
                f"{where} has {len(row)} choices, expected as many in every row, 2 to "
                f"{MOST_CHOICES}; leave such rows out"
            )
    return rows


def _number_of_choice(value: Any, choices: int) -> int | None:
    """Returns the number of a choice from a label; None where it is none."""
    if isinstance(value, str):
        text = value.strip()
        if text.isdecimal() and text.isascii():
            value = int(text[:9])
        elif len(text) == 1 and "A" <= text.upper() <= "Z":
            value = ord(text.upper()) - ord("A")
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return value if is_number and 0 <= value < choices else None
