"""Texts and text pairs as token ids for a classifier."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from adamerge_jax.data.examples import Examples, bucket_length, padded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class TextExamples(Examples):
    """Texts as token ids, tokenised once."""

    def __init__(
        self,
        texts: Sequence[str] | Sequence[tuple[str, str]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        name: str,
    ):
        """Tokenises all texts, cuts those over `max_length` tokens and says how many."""
        first, second = texts, None
        if not isinstance(texts[0], str):
            first, second = map(list, zip(*texts, strict=True))
        encoded = tokenizer(first, second, truncation=True, max_length=max_length)
        self._ids: list[list[int]] = encoded["input_ids"]
        self._types: list[list[int]] | None = encoded.get("token_type_ids")
        self._padding = tokenizer.pad_token_id
        self._max_length = max_length
        cut = sum(len(ids) == max_length for ids in self._ids)
        if cut:
            log.warning("%s: %d of %d texts reach max_length=%d", name, cut, len(self), max_length)

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
