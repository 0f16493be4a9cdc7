"""Texts and text pairs as token ids for a classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from adamerge_jax.data.examples import Cut, Examples, bucket_length, padded
from adamerge_jax.data.token_limits import TokenLimits
from adamerge_jax.data.tokenizers import encode, padding_of
from adamerge_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_CHARACTERS_PER_TOKEN = 64
"""Characters of a text per token of the longest, beyond which its beginning is tried alone."""


class TextExamples(Examples):
    """Texts as token ids, tokenised once."""

    def __init__(
        self,
        texts: Sequence[str] | Sequence[tuple[str, str]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        name: str,
        limits: TokenLimits | None = None,
    ):
        """Tokenises all texts and cuts those over `max_length` tokens.

        Args:
            texts: The texts, or pairs of them.
            tokenizer: The tokenizer.
            max_length: Longest text in tokens.
            name: Name of the examples in messages.
            limits: The limits of the model's tokens; None for any.

        Raises:
            InputError: The tokenizer fails, has no room for a text, or gives tokens that the model
                does not have.
        """
        pairs = None if isinstance(texts[0], str) else list(texts)
        first, second = map(list, zip(*pairs, strict=True)) if pairs else (texts, None)
        self._require_room(tokenizer, max_length, name, is_pair=pairs is not None)
        first = _beginnings(first, tokenizer, max_length, name)
        second = second and _beginnings(second, tokenizer, max_length, name)
        encoded = encode(tokenizer, first, name, second, truncation=True, max_length=max_length)
        self._keep(encoded, tokenizer, max_length, name, limits)
        # A text that fills all tokens may have had just as many.
        full = [row for row, ids in enumerate(self._ids) if len(ids) == max_length]
        cut = np.zeros(len(self), bool)
        if full:
            again = [[part[row] for row in full] for part in (first, second) if part is not None]
            lengths = map(len, encode(tokenizer, again[0], name, *again[1:])["input_ids"])
            cut[full] = [length > max_length for length in lengths]
        self.cut = Cut(cut, max_length)

    @staticmethod
    def _require_room(
        tokenizer: PreTrainedTokenizerBase, max_length: int, name: str, *, is_pair: bool
    ) -> None:
        """Refuses a length that the tokenizer's own tokens fill."""
        added = tokenizer.num_special_tokens_to_add(pair=is_pair)
        if max_length <= added:
            raise InputError(
                f"{name}: max_length={max_length} has no room for a text: the tokenizer adds "
                f"{added} tokens of its own; raise max_length, of the recipe or of the tokenizer"
            )

    def _keep(
        self,
        encoded: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        name: str,
        limits: TokenLimits | None,
    ) -> None:
        """Keeps the tokens of all texts, none of which is empty or unknown to the model."""
        if limits is not None:
            limits.require_encoded(encoded, name)
        self._ids: list[list[int]] = encoded["input_ids"]
        self._types: list[list[int]] | None = encoded.get("token_type_ids")
        self._padding = padding_of(tokenizer, limits and limits.vocabulary)
        self._max_length = max_length
        empty = [row for row, ids in enumerate(self._ids) if not ids]
        if empty:
            raise InputError(f"{name}, row {empty[0]}: the text has no token; leave it out")

    @property
    def token_ids(self) -> Sequence[Sequence[int]]:
        """The token ids of each text, without padding."""
        return self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def padded_length(self, index: Int[np.ndarray, " B"]) -> int:
        longest = max(len(self._ids[i]) for i in index)
        return min(bucket_length(longest), self._max_length)

    def take(self, index: Int[np.ndarray, " B"], length: int) -> dict[str, np.ndarray]:
        ids, mask = padded([self._ids[i] for i in index], length, self._padding)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._types is not None:
            inputs["token_type_ids"], _ = padded([self._types[i] for i in index], length, 0)
        return inputs


def _beginnings(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, name: str
) -> list[str]:
    """Returns texts without what is cut off anyway: tokenising megabytes takes many seconds.

    A text becomes its beginning, up to a space, where that alone has more than twice as many tokens
    as are used.
    """
    size = _CHARACTERS_PER_TOKEN * max_length
    shortened = list(texts)
    if tokenizer.truncation_side == "right":
        for row, text in enumerate(texts):
            words = text[:size].rsplit(None, 1) if len(text) > size else []
            if words and len(encode(tokenizer, words[:1], name)["input_ids"][0]) > 2 * max_length:
                shortened[row] = words[0]
    return shortened
