"""Pairs of texts for sentence embedders, which read each text by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from adamerge_jax.data.examples import Concatenated, Cut, Examples, Subset
from adamerge_jax.errors import InputError, shorten

if TYPE_CHECKING:
    from adamerge_jax.data.texts import TextExamples


class TextPairs(Examples):
    """Pairs of texts, `[N, 2, T]`, each text by itself."""

    texts = 2

    def __init__(self, first: TextExamples, second: TextExamples):
        """Pairs texts of one tokenizer.

        Args:
            first: The first text of each pair.
            second: The second one.
        """
        self._sides = first, second
        cuts = [side.cut for side in self._sides if side.cut is not None]
        if cuts:
            either = np.any([cut.examples for cut in cuts], axis=0)
            self.cut = Cut(either, cuts[0].max_length)
        self.partners = self.distinct()[1][:, 1]

    def __len__(self) -> int:
        return len(self._sides[0])

    def padded_length(self, index: Int[np.ndarray, " B"]) -> int:
        """Returns the tokens that both texts of chosen pairs are padded to."""
        return max(side.padded_length(index) for side in self._sides)

    def take(self, index: Int[np.ndarray, " B"], length: int) -> dict[str, np.ndarray]:
        """Returns the inputs of chosen pairs, `[B, 2, T]` each."""
        first, second = (side.take(index, length) for side in self._sides)
        return {name: np.stack([first[name], second[name]], axis=1) for name in first}

    def distinct(self) -> tuple[Examples, Int[np.ndarray, "N 2"]]:
        """Returns the distinct texts, and the places of each pair's two among them."""
        places: dict[tuple[int, ...], int] = {}
        index = np.empty((2, len(self)), int)
        firsts: list[int] = []
        for side, texts in enumerate(self._sides):
            for row, token_ids in enumerate(texts.token_ids):
                place = places.setdefault(tuple(token_ids), len(places))
                if place == len(firsts):
                    firsts.append(side * len(self) + row)
                index[side, row] = place
        return Subset(Concatenated(self._sides), np.array(firsts)), index.T


def pair_scores(
    values: Sequence[Any], numbers: Sequence[int], column: str, name: str
) -> Float[np.ndarray, " N"]:
    """Returns the scores of pairs.

    Args:
        values: The values of their column.
        numbers: The number of each row in its file, for messages.
        column: The column.
        name: Name of the examples in messages.

    Raises:
        InputError: A value is no finite number.
    """
    scores = np.empty(len(values))
    for row, value in enumerate(values):
        try:
            score = np.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            score = np.nan
        if not np.isfinite(score):
            raise InputError(
                f"{name}, row {numbers[row]}: {column!r} is {shorten(repr(value))}; expected the "
                "score of the pair, a number that is larger for texts that are more alike"
            )
        scores[row] = score
    return scores
