"""The exact match of a language model's own answers with the responses in its data."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Array

from adamerge_jax.data.answers import Answers
from adamerge_jax.data.examples import Examples
from adamerge_jax.evaluation.generate import Writer
from adamerge_jax.runs.counting import ShowCount, count_silently
from adamerge_jax.runs.rows import ExampleScores

SHORT = 16
"""The median number of tokens of responses up to which answers are written by default."""

SLACK = 4
"""Tokens beyond those of the longest response: a text may be written in more tokens than it is read
in, and has an end."""


class Answering(NamedTuple):
    """The way in which models answer the prompts of test data.

    Attributes:
        writer: The models of an architecture that writes.
        exact_match: True for all tasks that have responses, False for none, None for those with
            short ones.
        max_new_tokens: The largest number of tokens of an answer.
        show: Shows how many answers are written.
    """

    writer: Writer
    exact_match: bool | None
    max_new_tokens: int
    show: ShowCount = count_silently

    def is_asked(self, examples: Examples) -> bool:
        """Returns True if models are to answer the prompts of a task's examples."""
        if self.exact_match is False or not examples.answers:
            return False
        return self.exact_match is True or examples.answers.median_length <= SHORT

    def scores(
        self, parameters: Mapping[str, Array], answers: Answers, words: str = "answers"
    ) -> ExampleScores:
        """Returns 1 for each answer that is the response, and 0 for others.

        Args:
            parameters: The model's parameters by name.
            answers: The prompts and responses.
            words: Words for the answers, to show with their number.
        """
        longest = max(map(len, answers.responses)) + SLACK
        with self.show(words, len(answers.prompts)) as on_count:
            written = self.writer.continuations(
                parameters,
                answers.prompts,
                answers.stops,
                min(self.max_new_tokens, longest),
                beside=answers.beside,
                on_count=on_count,
            )
        right = [answers.are_given(at, tokens) for at, tokens in enumerate(written)]
        return ExampleScores(np.array(right, np.float32), np.ones(len(right), np.int32))
