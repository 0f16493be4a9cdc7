"""Batches whose texts lie behind each other in rows, so that nothing is computed on padding."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from adamerge_jax.data.examples import Examples
from adamerge_jax.models.token_rows import PLACES, SLOTS

_LEAST_SAVED = 0.1
"""The part of a batch's cost that packing must save."""

_ATTENTION = 1500
"""The length of rows at which attention to a token costs as much as the rest of its layer does."""

_COUNTED_AT_ONCE = 4096
"""Texts whose tokens are counted together: their arrays are in memory, padded to the longest."""

BATCHES_TRIED = 16
"""The batches by which the rows of packed texts are chosen."""


class Packing(NamedTuple):
    """The rows that the texts of a batch are packed in.

    Attributes:
        length: L, the slots of a row: the longest text fits.
        rows: R, enough for nearly all batches; others have a quarter more, or as many as they need.
    """

    length: int
    rows: int

    def pack(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns a batch with the slots and the places of its tokens.

        Args:
            inputs: The batch, `[B, L]`, with an attention mask.
        """
        mask = inputs["attention_mask"] > 0
        rows, used = _first_fit(mask.sum(1), self.length)
        # Few numbers of rows, as each is compiled.
        quarter = max(1, self.rows // 4)
        more = -(-max(0, used - self.rows) // quarter) * quarter
        slots = np.full((self.rows + more) * self.length, -1, np.int32)
        places = np.zeros(mask.shape, np.int32)
        filled = np.zeros(used, int)
        for text, row in enumerate(rows):
            tokens = np.flatnonzero(mask[text])
            start = row * self.length + filled[row]
            filled[row] += len(tokens)
            slots[start : start + len(tokens)] = text * self.length + tokens
            places[text, tokens] = np.arange(start, start + len(tokens))
        return {**inputs, SLOTS: slots.reshape(-1, self.length), PLACES: places}


def token_counts(examples: Examples) -> Int[np.ndarray, " N"] | None:
    """Returns the number of tokens of each text; None where examples cannot be packed.

    That is, where they are no texts with a mask, each of which begins with a token and has padding
    only behind its last one.
    """
    parts = []
    for start in range(0, len(examples), _COUNTED_AT_ONCE):
        index = np.arange(start, min(start + _COUNTED_AT_ONCE, len(examples)))
        mask = examples.take(index, examples.padded_length(index)).get("attention_mask")
        if mask is None or mask.ndim != 2:
            return None
        counts = (mask > 0).sum(1)
        is_first = np.arange(mask.shape[1]) < counts[:, None]
        if not counts.all() or (is_first != (mask > 0)).any():
            return None
        parts.append(counts)
    return np.concatenate(parts)


def packing_for(
    lengths: Sequence[Int[np.ndarray, " B"]], longest: int, padded_tokens: float
) -> Packing | None:
    """Returns the rows for batches like these; None where padded batches cost hardly more.

    Args:
        lengths: The tokens of each text in some batches.
        longest: The tokens that the longest text of all is padded to.
        padded_tokens: The tokens of as many batches that are padded each to its own longest text.
    """
    rows = max(_first_fit(batch, longest)[1] for batch in lengths)
    packed_tokens = len(lengths) * rows * longest
    if packed_tokens * (1 + longest / _ATTENTION) > (1 - _LEAST_SAVED) * padded_tokens:
        return None
    return Packing(longest, rows)


def _first_fit(lengths: Int[np.ndarray, " B"], size: int) -> tuple[Int[np.ndarray, " B"], int]:
    """Returns the row of each text, the longest ones first, and the number of rows."""
    left = np.full(len(lengths), size)
    rows = np.zeros(len(lengths), int)
    for text in np.argsort(-lengths, kind="stable"):
        rows[text] = np.argmax(left >= lengths[text])
        left[rows[text]] -= lengths[text]
    return rows, int(rows.max()) + 1
