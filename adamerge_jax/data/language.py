"""Texts, prompts with responses and conversations as tokens that a language model is to predict."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from adamerge_jax.data.examples import Examples, bucket_length, padded
from adamerge_jax.data.tables import Table
from adamerge_jax.errors import InputError
from adamerge_jax.objectives import NOT_PREDICTED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class Tokens(NamedTuple):
    """A sequence of tokens.

    Attributes:
        ids: Token ids.
        predicted: True for each token that is to be predicted from those before it.
    """

    ids: list[int]
    predicted: list[bool]


class DecoderExamples(Examples):
    """Sequences for a decoder."""

    def __init__(self, sequences: Sequence[Tokens], padding: int, max_length: int):
        self._sequences = sequences
        self._padding = padding
        self._max_length = max_length

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


class EncoderDecoderExamples(Examples):
    """Prompts for an encoder and responses for a decoder."""

    def __init__(
        self,
        prompts: Sequence[list[int]],
        responses: Sequence[list[int]],
        start: int,
        padding: int,
        max_length: int,
    ):
        self._prompts = prompts
        self._responses = responses
        self._start = start
        self._padding = padding
        self._max_length = max_length

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


def make_language_examples(
    table: Table,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    decoder_start: int | None,
) -> Examples:
    """Makes examples of a table with conversations, prompts and responses, or texts.

    Args:
        table: The table. The first of these columns that it has decides: `source.messages`,
            `source.prompt` with `source.response`, `source.text`.
        tokenizer: The base's tokenizer.
        max_length: Longest sequence in tokens; what is longer is cut and counted in a warning.
        decoder_start: The token that an encoder-decoder's responses start with; None for a decoder.

    Raises:
        InputError: The table has none of these columns, a row holds something else, or nothing
            is left to predict.
    """
    source, columns = table.source, table.columns
    padding = next(
        token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None
    )
    if decoder_start is not None:
        if not {source.prompt, source.response} <= columns:
            raise table.lacks([f"{source.prompt!r} and {source.response!r}"])
        if source.packed:
            raise InputError(
                f"{table.name}: packed is for decoders; an encoder-decoder reads one prompt at a "
                "time"
            )
        pairs = _pairs(table, tokenizer, max_length)
        prompts, responses = map(list, zip(*pairs, strict=True))
        return EncoderDecoderExamples(prompts, responses, decoder_start, padding, max_length)
    if source.messages in columns:
        if not tokenizer.is_fast:
            raise InputError(
                f"{table.name}: the tokenizer ({type(tokenizer).__name__}) does not say which "
                "characters a token stands for, so conversations cannot be used; give prompts and "
                "responses"
            )
        sequences = [
            _conversation(messages, row, table, tokenizer)
            for row, messages in enumerate(table.rows[source.messages])
        ]
    elif {source.prompt, source.response} <= columns:
        sequences = _prompts_and_responses(table, tokenizer)
    elif source.text in columns:
        encoded = tokenizer(table.texts(source.text))["input_ids"]
        sequences = [_ended(Tokens(ids, [True] * len(ids)), tokenizer) for ids in encoded]
    else:
        expected = [
            repr(source.messages),
            f"{source.prompt!r} and {source.response!r}",
            repr(source.text),
        ]
        raise table.lacks(expected)
    if source.packed:
        sequences = _packed(sequences, max_length)
    else:
        cut = sum(len(sequence.ids) > max_length for sequence in sequences)
        _tell_cut(table, cut, len(sequences), max_length)
        sequences = [Tokens(ids[:max_length], counts[:max_length]) for ids, counts in sequences]
    useful = [sequence for sequence in sequences if any(sequence.predicted[1:])]
    _tell_left_out(table, len(useful), len(sequences), max_length)
    return DecoderExamples(useful, padding, max_length)


def _pairs(
    table: Table, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """Returns prompts for an encoder and the responses to them, cut to `max_length` tokens."""
    prompts = tokenizer(table.texts(table.source.prompt))["input_ids"]
    responses = [
        _ended(Tokens(ids, [True] * len(ids)), tokenizer).ids
        for ids in tokenizer(table.texts(table.source.response))["input_ids"]
    ]
    pairs = list(zip(prompts, responses, strict=True))
    cut = sum(max(map(len, pair)) > max_length for pair in pairs)
    _tell_cut(table, cut, len(pairs), max_length)
    useful = [(prompt[:max_length], answer[:max_length]) for prompt, answer in pairs if answer]
    _tell_left_out(table, len(useful), len(pairs), max_length)
    return useful


def _prompts_and_responses(table: Table, tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    source = table.source
    prompts = tokenizer(table.texts(source.prompt))["input_ids"]
    responses = tokenizer(table.texts(source.response), add_special_tokens=False)["input_ids"]
    sequences = []
    for prompt, response in zip(prompts, responses, strict=True):
        # Some tokenizers end every text; here it goes on.
        if prompt and prompt[-1] == tokenizer.eos_token_id:
            prompt = prompt[:-1]
        predicted = [source.predict == "all"] * len(prompt) + [True] * len(response)
        sequences.append(_ended(Tokens(prompt + response, predicted), tokenizer))
    return sequences


def _conversation(
    messages: Sequence[Mapping[str, Any]],
    row: int,
    table: Table,
    tokenizer: PreTrainedTokenizerBase,
) -> Tokens:
    """Writes a conversation in the chat template; the assistant's turns are predicted."""
    source = table.source
    where = f"{table.name}: {source.path}, row {row}"
    roles = [
        message.get("role") if isinstance(message, Mapping) else None
        for message in (messages if isinstance(messages, list) else [messages])
    ]
    if not roles or not all(isinstance(role, str) for role in roles):
        raise InputError(
            f"{where}: column {source.messages!r} is to hold a list of messages, each with a role "
            f"and content; it holds {messages!r:.80}"
        )

    def render(count: int, asked: bool) -> str:
        return tokenizer.apply_chat_template(
            list(messages[:count]), tokenize=False, add_generation_prompt=asked
        )

    answers = []
    if source.predict == "response":
        # What a conversation opens with answers nothing.
        answers = [turn for turn, role in enumerate(roles) if role == "assistant" and turn > 0]
    try:
        whole = render(len(messages), asked=False)
        parts = [(render(turn, asked=True), render(turn + 1, asked=False)) for turn in answers]
    except Exception as error:  # jinja's own, the template's raise_exception, KeyError, TypeError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{where}: the tokenizer's chat template cannot write this conversation: {reason}"
        ) from error
    if not all(whole.startswith(answered) for _, answered in parts):
        raise InputError(
            f"{where}: the chat template rewrites earlier turns, so the assistant's tokens cannot "
            "be told; give one turn per example, or set predict: all"
        )
    # What asks for an answer may go on where the answer itself does not, e.g. with `<think>`.
    spans = [(_count_shared(asked, whole), len(answered)) for asked, answered in parts]
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    predicted = [
        source.predict == "all" or any(first < end and start < last for first, last in spans)
        for start, end in encoded["offset_mapping"]
    ]
    return Tokens(encoded["input_ids"], predicted)


def _count_shared(first: str, second: str) -> int:
    """Returns the number of characters that two texts share at their beginning."""
    pairs = zip(first, second, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _ended(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Adds the token that ends a text, where the tokenizer has one: it is to be predicted too."""
    end = tokenizer.eos_token_id
    if end is None or (tokens.ids and tokens.ids[-1] == end):
        return tokens
    return Tokens([*tokens.ids, end], [*tokens.predicted, True])


def _packed(sequences: Sequence[Tokens], length: int) -> list[Tokens]:
    """Joins all sequences and cuts them into pieces of `length` tokens."""
    ids = [token for sequence in sequences for token in sequence.ids]
    predicted = [counts for sequence in sequences for counts in sequence.predicted]
    starts = range(0, len(ids), length)
    return [Tokens(ids[at : at + length], predicted[at : at + length]) for at in starts]


def _tell_left_out(table: Table, useful: int, count: int, max_length: int) -> None:
    if not useful:
        raise InputError(
            f"{table.name}: no example of {table.source.path} has a token to predict within "
            f"max_length={max_length}; raise max_length"
        )
    if useful < count:
        log.warning(
            f"{table.name}: {count - useful} of {count} examples are left out: no token to predict "
            f"within max_length={max_length}"
        )


def _tell_cut(table: Table, cut: int, count: int, max_length: int) -> None:
    if cut:
        log.warning(f"{table.name}: {cut} of {count} examples are cut to {max_length=} tokens")
