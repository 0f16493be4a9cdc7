"""The token ids, types and lengths that a model can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from adamerge_jax.errors import InputError


class TokenLimits(NamedTuple):
    """The tokens that a model can read. JAX reads the nearest row of a table where there is none.

    Attributes:
        vocabulary: Number of rows of its embedding table.
        longest: Number of its positions; None where any number will do.
        types: Number of its token types; None if it has none.
    """

    vocabulary: int
    longest: int | None
    types: int | None = None

    def require(self, token_ids: Int[np.ndarray, "N T"], where: str) -> None:
        """Refuses arrays of token ids that are none of this model's.

        Args:
            token_ids: The token ids of N texts, any array of two axes.
            where: The beginning of error messages.

        Raises:
            InputError: They are no whole numbers, too large, or too many.
        """
        if not np.issubdtype(token_ids.dtype, np.integer):
            raise InputError(f"{where}: input_ids are {token_ids.dtype}, expected whole numbers")
        if token_ids.size and (token_ids.min() < 0 or token_ids.max() >= self.vocabulary):
            raise InputError(
                f"{where}: input_ids go from {token_ids.min()} to {token_ids.max()}, the model's "
                f"tokens from 0 to {self.vocabulary - 1}; they are another tokenizer's"
            )
        if self.longest is not None and token_ids.shape[1] > self.longest:
            raise InputError(
                f"{where}: input_ids: texts have {token_ids.shape[1]} tokens, the model has "
                f"positions for {self.longest}; truncate them to {self.longest}"
            )

    def require_types(self, token_types: Shaped[np.ndarray, "N T"], where: str) -> None:
        """Refuses arrays of token types that are none of this model's.

        Raises:
            InputError: They are no whole numbers, or too large.
        """
        if not np.issubdtype(token_types.dtype, np.integer):
            raise InputError(
                f"{where}: token_type_ids are {token_types.dtype}, expected whole numbers"
            )
        types = self.types or 0
        if token_types.size and (token_types.min() < 0 or token_types.max() >= types):
            raise InputError(
                f"{where}: token_type_ids go from {token_types.min()} to {token_types.max()}, the "
                f"model's token types from 0 to {types - 1}; leave the array out, or make it with "
                "the model's own tokenizer"
            )

    def require_encoded(self, encoded: Mapping[str, Sequence[Sequence[int]]], where: str) -> None:
        """Refuses what a tokenizer made of texts if it is none of this model's.

        Args:
            encoded: `input_ids`, and where the tokenizer gives them `token_type_ids`, by text.
            where: The beginning of error messages.

        Raises:
            InputError: A number is too large; the message names its row.
        """
        limits = {"input_ids": ("token", self.vocabulary), "token_type_ids": ("type", self.types)}
        for name, (kind, count) in limits.items():
            if name not in encoded or count is None:
                continue
            for row, numbers in enumerate(encoded[name]):
                if max(numbers, default=0) >= count:
                    raise InputError(
                        f"{where}, row {row}: the tokenizer gives a {kind} {max(numbers)}, the "
                        f"model has {kind}s 0 to {count - 1}; the tokenizer is another model's"
                    )


def require_mask(mask: Shaped[np.ndarray, "N T"], where: str) -> None:
    """Refuses an attention mask that does not tell tokens from padding.

    Raises:
        InputError: A value is neither 0 nor 1, or a text has no token.
    """
    is_number = np.issubdtype(mask.dtype, np.number) or mask.dtype == bool
    if not is_number or not np.isin(mask, (0, 1)).all():
        wrong = mask[~np.isin(mask, (0, 1))][0] if is_number else mask.dtype
        raise InputError(
            f"{where}: attention_mask holds {wrong}; expected 1 for a token and 0 for padding"
        )
    empty = np.flatnonzero(~mask.astype(bool).any(axis=1))
    if len(empty):
        raise InputError(
            f"{where}: attention_mask of row {empty[0]} has no 1: a text has at least one token"
        )
