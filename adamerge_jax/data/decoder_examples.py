"""Sequences of tokens that a decoder is to predict."""

from collections.abc import Sequence
from itertools import takewhile

import numpy as np
from jaxtyping import Bool, Int

from adamerge_jax.data.conversations import Tokens
from adamerge_jax.data.examples import Cut, Examples, bucket_length, padded
from adamerge_jax.objectives import NOT_PREDICTED


class DecoderExamples(Examples):
    """Sequences for a decoder."""

    def __init__(self, sequences: Sequence[Tokens], padding: int, max_length: int):
        """Takes sequences; tokens beyond `max_length` are cut."""
        self._sequences = [
            Tokens(ids[:max_length], told[:max_length], [end for end in ends if end < max_length])
            for ids, told, ends in sequences
        ]
        self._padding = padding
        self._max_length = max_length
        columns = zip(*(sequence.ids for sequence in self._sequences), strict=False)
        self._shared = len(list(takewhile(lambda tokens: len(set(tokens)) == 1, columns)))
        self.cut = Cut(
            np.array([len(sequence.ids) > max_length for sequence in sequences]), max_length
        )

    def __len__(self) -> int:
        return len(self._sequences)

    def padded_length(self, index: Int[np.ndarray, " B"]) -> int:
        longest = max(len(self._sequences[i].ids) for i in index)
        return min(bucket_length(longest), self._max_length)

    def take(self, index: Int[np.ndarray, " B"], length: int) -> dict[str, np.ndarray]:
        ids, mask = padded([self._sequences[i].ids for i in index], length, self._padding)
        return {"input_ids": ids, "attention_mask": mask}

    def take_labels(self, index: Int[np.ndarray, " B"], length: int) -> Int[np.ndarray, "B T"]:
        """Returns the token after each position, or `NOT_PREDICTED`."""
        rows = []
        for i in index:
            following = zip(self._sequences[i].ids, self._sequences[i].predicted, strict=True)
            rows.append([token if counts else NOT_PREDICTED for token, counts in following][1:])
        return padded(rows, length, NOT_PREDICTED)[0]

    def take_ends(self, index: Int[np.ndarray, " B"], length: int) -> Bool[np.ndarray, "B T"]:
        is_end = np.zeros((len(index), length), bool)
        for row, i in enumerate(index):
            # The first token of all is predicted nowhere.
            is_end[row, [end - 1 for end in self._sequences[i].ends if end > 0]] = True
        return is_end

    def take_prompts(self, index: Int[np.ndarray, " B"], length: int) -> Bool[np.ndarray, "B T"]:
        in_prompt = np.zeros((len(index), length), bool)
        for row, i in enumerate(index):
            counts = np.array(self._sequences[i].predicted, bool)
            in_prompt[row, : len(counts) - 1] = ~counts[1:]
        in_prompt[:, : max(0, self._shared - 1)] = False
        return in_prompt
