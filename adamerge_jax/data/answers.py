"""Prompts and the answers that belong to them, to compare a model's own answers with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from adamerge_jax.data.conversations import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


InputsBeside = Callable[[Int[np.ndarray, " n"], int], dict[str, np.ndarray]]
"""The function `(answers, length) -> inputs` that returns what a model reads beside the tokens of
chosen prompts that are continued up to a length."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """The prompts of some examples, and their responses.

    Attributes:
        tokenizer: The tokenizer that turns tokens into text.
        examples: The position of each among all examples, `[A]`.
        prompts: The tokens up to each response.
        responses: The tokens of each response, without an end.
        stops: The tokens that end a response; without any, as many tokens as the response has are
            the model's answer.
        beside: Returns the inputs beside the tokens; None for texts alone.
    """

    tokenizer: PreTrainedTokenizerBase
    examples: Int[np.ndarray, " A"]
    prompts: Sequence[list[int]]
    responses: Sequence[list[int]]
    stops: tuple[int, ...]
    beside: InputsBeside | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def median_length(self) -> float:
        """The median number of tokens of a response."""
        return float(np.median([len(response) for response in self.responses]))

    def are_given(self, answer: int, tokens: list[int]) -> bool:
        """Returns True if a continuation is the response, but for white space around it.

        Args:
            answer: The position among the answers.
            tokens: The tokens behind the prompt, without one that ends them.
        """
        response = self.responses[answer]
        if not self.stops:
            tokens = tokens[: len(response)]
        return tokens == response or self._text(tokens) == self._text(response)

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def subset(self, index: Int[np.ndarray, " N"]) -> Answers:
        """Returns the answers of some of the examples, by their positions in `index`."""
        place = {int(example): at for at, example in enumerate(self.examples)}
        chosen = [(row, place[int(i)]) for row, i in enumerate(index) if int(i) in place]
        of_chosen, places = self.beside, np.array([at for _, at in chosen], int)

        def beside(answers: Int[np.ndarray, " n"], length: int) -> dict[str, np.ndarray]:
            assert of_chosen is not None
            return of_chosen(places[answers], length)

        return dataclasses.replace(
            self,
            beside=None if of_chosen is None else beside,
            examples=np.array([row for row, _ in chosen], int),
            prompts=[self.prompts[at] for _, at in chosen],
            responses=[self.responses[at] for _, at in chosen],
        )


def find_answers(
    sequences: Sequence[Tokens],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    has_end: bool,
    image: int | None = None,
) -> Answers | None:
    """Finds each sequence's last response and the prompt before it.

    A response that is cut, that nothing stands before, or that an image comes after is left out.

    Args:
        sequences: The tokens of the examples.
        tokenizer: The tokenizer of all.
        max_length: Longest sequence in tokens.
        has_end: True if models end a response themselves: by the tokenizer's end of text, or by
            the token that stands behind a response.
        image: The token that stands for a piece of an image; None for texts alone.

    Returns:
        The answers, or None if there are none.
    """
    examples, prompts, responses = [], [], []
    stops = {tokenizer.eos_token_id} if has_end else set()
    for row, (ids, predicted, ends) in enumerate(sequences):
        counts = np.array(predicted, bool)
        counts[list(ends)] = False
        places = np.flatnonzero(counts)
        if not len(places) or places[-1] >= max_length:
            continue
        last = int(places[-1]) + 1
        gaps = np.flatnonzero(~counts[:last])
        if not len(gaps):
            continue
        first = int(gaps[-1]) + 1
        if image is not None and image in ids[last:]:
            continue
        examples.append(row)
        prompts.append(ids[:first])
        responses.append(ids[first:last])
        if has_end and last < len(ids):
            stops.add(ids[last])
    return _answers(tokenizer, examples, prompts, responses, stops)


def answers_of_pairs(
    prompts: Sequence[list[int]],
    responses: Sequence[Tokens],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    has_end: bool,
) -> Answers | None:
    """Returns an encoder-decoder's prompts and responses, but for those that are cut or empty.

    Args:
        prompts: The tokens of the prompts, which are cut.
        responses: The tokens of the responses.
        tokenizer: The tokenizer of all.
        max_length: Longest prompt, and longest response, in tokens.
        has_end: True if models end a response themselves.

    Returns:
        The answers, or None if there are none.
    """
    texts = [
        [token for at, token in enumerate(ids) if at not in ends] for ids, _, ends in responses
    ]
    rows = [
        row
        for row, response in enumerate(responses)
        if texts[row] and len(response.ids) <= max_length
    ]
    stops = {tokenizer.eos_token_id} if has_end else set()
    asked = [prompts[row][:max_length] for row in rows]
    return _answers(tokenizer, rows, asked, [texts[row] for row in rows], stops)


def _answers(
    tokenizer: PreTrainedTokenizerBase,
    examples: list[int],
    prompts: list[list[int]],
    responses: list[list[int]],
    stops: Collection[int | None],
) -> Answers | None:
    if not examples:
        return None
    known = tuple(sorted(stop for stop in stops if stop is not None))
    return Answers(tokenizer, np.array(examples), prompts, responses, known)
