"""Texts and prompts with responses as tokens that a language model is to predict."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int

from adamerge_jax.data.answers import answers_of_pairs, find_answers
from adamerge_jax.data.conversations import Tokens, conversations
from adamerge_jax.data.decoder_examples import DecoderExamples
from adamerge_jax.data.end_of_text import (
    ASKED_EXAMPLES,
    PredictsEnd,
    end_of_chats,
    end_token,
    ended,
    without_end,
)
from adamerge_jax.data.examples import Cut, EndOfText, Examples, bucket_length, padded
from adamerge_jax.data.image_conversations import ConversationImages, WithImages
from adamerge_jax.data.tables import Table
from adamerge_jax.data.token_limits import TokenLimits
from adamerge_jax.data.tokenizers import encode, padding_of
from adamerge_jax.errors import InputError
from adamerge_jax.objectives import NOT_PREDICTED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class EncoderDecoderExamples(Examples):
    """Prompts for an encoder and responses for a decoder."""

    def __init__(
        self,
        prompts: Sequence[list[int]],
        responses: Sequence[list[int]],
        start: int,
        padding: int,
        max_length: int,
        ends: Sequence[Sequence[int]] | None = None,
    ):
        """Takes token ids; those beyond `max_length` are cut on either side.

        Args:
            prompts: The prompts.
            responses: The responses.
            start: The token that the decoder starts with.
            padding: The token that pads.
            max_length: Longest prompt, and longest response.
            ends: The positions in each response of tokens that are its end.
        """
        pairs = list(zip(prompts, responses, strict=True))
        self._prompts = [prompt[:max_length] for prompt in prompts]
        self._responses = [response[:max_length] for response in responses]
        self._ends = [()] * len(pairs) if ends is None else ends
        self._start = start
        self._padding = padding
        self._max_length = max_length
        self.cut = Cut(np.array([max(map(len, pair)) > max_length for pair in pairs]), max_length)

    def __len__(self) -> int:
        return len(self._prompts)

    def padded_length(self, index: Int[np.ndarray, " B"]) -> int:
        longest = max(max(len(self._prompts[i]), len(self._responses[i])) for i in index)
        return min(bucket_length(longest), self._max_length)

    def take(self, index: Int[np.ndarray, " B"], length: int) -> dict[str, np.ndarray]:
        prompts, mask = padded([self._prompts[i] for i in index], length, self._padding)
        shifted = [[self._start, *self._responses[i][:-1]] for i in index]
        decoder, decoder_mask = padded(shifted, length, self._padding)
        return {
            "input_ids": prompts,
            "attention_mask": mask,
            "decoder_input_ids": decoder,
            "decoder_attention_mask": decoder_mask,
        }

    def take_labels(self, index: Int[np.ndarray, " B"], length: int) -> Int[np.ndarray, "B T"]:
        """Returns the response's token at each position, or `NOT_PREDICTED`."""
        return padded([self._responses[i] for i in index], length, NOT_PREDICTED)[0]

    def take_ends(self, index: Int[np.ndarray, " B"], length: int) -> Bool[np.ndarray, "B T"]:
        is_end = np.zeros((len(index), length), bool)
        for row, i in enumerate(index):
            is_end[row, [end for end in self._ends[i] if end < length]] = True
        return is_end


def make_language_examples(
    table: Table,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    decoder_start: int | None,
    predicts_end: PredictsEnd,
    limits: TokenLimits | None = None,
    images: ConversationImages | None = None,
    folder: Path | None = None,
) -> Examples:
    """Makes examples of a table with conversations, prompts and responses, or texts.

    Args:
        table: The table. The first of these columns that it has decides: `source.messages`,
            `source.prompt` with `source.response`, `source.text`.
        tokenizer: The base's tokenizer.
        max_length: Longest sequence in tokens; what is longer is cut.
        decoder_start: The token that an encoder-decoder's responses start with; None for a decoder.
        predicts_end: The task's expert, which is asked about the end of text where the source says
            `auto` and holds no conversations.
        limits: The limits of the model's tokens; None for any.
        images: The reader of images in conversations, of a model that reads some.
        folder: The folder in which these images are; None where there is none.

    Raises:
        InputError: The table has none of these columns, a row holds something else, nothing is
            left to predict, the tokenizer has no end of text although it is asked for, or tokens
            that the model lacks.
    """
    source, columns = table.source, table.columns
    padding = padding_of(tokenizer, limits and limits.vocabulary)
    prompts: list[list[int]] = []

    def make(rows: Sequence[int], sequences: Sequence[Tokens]) -> Examples:
        if decoder_start is None:
            decoder = DecoderExamples(sequences, padding, max_length)
            return decoder if images is None else images.beside(decoder, rows)
        responses = [sequence.ids for sequence in sequences]
        asked = [prompts[row] for row in rows]
        ends = [sequence.ends for sequence in sequences]
        return EncoderDecoderExamples(asked, responses, decoder_start, padding, max_length, ends)

    is_chat = decoder_start is None and source.messages in columns
    end: EndOfText = end_of_chats(table) if is_chat else "leave"
    if is_chat and images is not None:
        sequences = images.read(table, folder, with_end=end == "append")
        if source.packed and any(images.counts):
            raise InputError(f"{table.name}: packed is for texts without images; leave it out")
    elif is_chat:
        sequences = conversations(table, tokenizer, with_end=end == "append")
    elif decoder_start is not None:
        if not {source.prompt, source.response} <= columns:
            raise table.lacks([f"{source.prompt!r} and {source.response!r}"])
        if source.packed:
            raise InputError(
                f"{table.name}: packed is for decoders; an encoder-decoder reads one prompt at a "
                "time"
            )
        prompts = encode(tokenizer, table.texts(source.prompt), table.name)["input_ids"]
        sequences = _texts(table, source.response, tokenizer)
    elif {source.prompt, source.response} <= columns:
        sequences = _prompts_and_responses(table, tokenizer)
    elif source.text in columns:
        sequences = _texts(table, source.text, tokenizer)
    else:
        expected = [
            repr(source.messages),
            f"{source.prompt!r} and {source.response!r}",
            repr(source.text),
        ]
        raise table.lacks(expected)
    if limits is not None:
        for ids in (prompts, [sequence.ids for sequence in sequences]):
            limits.require_encoded({"input_ids": ids}, table.name)
    # The first token of a decoder is predicted from nothing.
    first = 1 if decoder_start is None else 0
    token = None if is_chat else end_token(table, tokenizer, limits)
    if token is not None:
        finished = [ended(sequence, token) for sequence in sequences]
        fitting = [
            row
            for row, (sequence, whole) in enumerate(zip(sequences, finished, strict=True))
            if any(sequence.predicted[first:])
            and len(sequence.ids) < len(whole.ids) <= max_length
            and (not prompts or len(prompts[row]) <= max_length)
        ]
        few = fitting[:ASKED_EXAMPLES]
        if source.end_of_text == "append" or (
            few and predicts_end(make(few, [finished[row] for row in few]))
        ):
            end, sequences = "append", finished
    if source.packed:
        sequences = _packed(sequences, max_length)
    predicting = [
        row for row, sequence in enumerate(sequences) if any(sequence.predicted[first:max_length])
    ]
    useful = [row for row in predicting if images is None or images.is_whole(row, max_length)]
    count = len(sequences)
    _tell_left_out(table, count, count - len(predicting), len(predicting) - len(useful), max_length)
    chosen = [sequences[row] for row in useful]
    examples = make(useful, chosen)
    examples.end_of_text = end
    examples.are_conversations = is_chat
    has_end = is_chat or end == "append"
    if decoder_start is not None:
        asked = [prompts[row] for row in useful]
        examples.answers = answers_of_pairs(asked, chosen, tokenizer, max_length, has_end=has_end)
    elif not source.packed:
        find = examples.find_answers if isinstance(examples, WithImages) else find_answers
        examples.answers = find(chosen, tokenizer, max_length, has_end=has_end)
    return examples


def _texts(table: Table, column: str, tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """Returns the texts of a column, all of whose tokens are predicted, without an end."""
    encoded = encode(tokenizer, table.texts(column), table.name)["input_ids"]
    return [Tokens(ids, [True] * len(ids)) for ids in without_end(encoded, tokenizer)]


def _prompts_and_responses(table: Table, tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """Returns prompts with their responses behind them, without an end."""
    source = table.source
    prompts = encode(tokenizer, table.texts(source.prompt), table.name)["input_ids"]
    responses = encode(
        tokenizer, table.texts(source.response), table.name, add_special_tokens=False
    )["input_ids"]
    return [
        Tokens(prompt + response, [source.predict == "all"] * len(prompt) + [True] * len(response))
        for prompt, response in zip(without_end(prompts, tokenizer), responses, strict=True)
    ]


def _packed(sequences: Sequence[Tokens], length: int) -> list[Tokens]:
    """Joins all sequences and cuts them into pieces of `length` tokens."""
    ids = [token for sequence in sequences for token in sequence.ids]
    predicted = [counts for sequence in sequences for counts in sequence.predicted]
    is_end = [at in sequence.ends for sequence in sequences for at in range(len(sequence.ids))]
    pieces = [slice(at, at + length) for at in range(0, len(ids), length)]
    return [
        Tokens(ids[piece], predicted[piece], np.flatnonzero(is_end[piece]).tolist())
        for piece in pieces
    ]


def _tell_left_out(
    table: Table, count: int, without_token: int, with_cut_image: int, max_length: int
) -> None:
    """Tells of the examples that are left out, and refuses to leave all of them out."""
    if without_token + with_cut_image == count:
        images = " and all of its images" if with_cut_image else ""
        raise InputError(
            f"{table.name}: no example of {table.source.path} has a token to predict{images} "
            f"within max_length={max_length}; raise max_length"
        )
    reasons = {"no token to predict": without_token, "not all of its images": with_cut_image}
    for reason, number in reasons.items():
        if number:
            log.warning(
                f"{table.name}: {number} of {count} examples are left out: {reason} within "
                f"max_length={max_length}"
            )
