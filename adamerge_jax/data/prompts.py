"""Prompts without answers, which a model is to write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adamerge_jax.data.chat_templates import Chat, write_chats
from adamerge_jax.data.conversations import PROBE, Tokens
from adamerge_jax.data.decoder_examples import DecoderExamples
from adamerge_jax.data.end_of_text import without_end
from adamerge_jax.data.tables import Table
from adamerge_jax.data.token_limits import TokenLimits
from adamerge_jax.data.tokenizers import encode, padding_of
from adamerge_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERAL = Path(__file__).with_name("general_prompts.jsonl")
"""General prompts for chat models: facts, explanations, writing, arithmetic, code, translation,
advice, lists, words, history and opinions."""

_SENTENCE_END = re.compile(r"[^\W\d_][\"')\]]*[.!?][\"')\]]*$|\w.*\n$", re.DOTALL)
"""The end of a sentence, which is no number in a list."""

FEWEST_TOKENS = 8
"""Room that a prompt must leave for its answer, in tokens."""


class Prompts:
    """Prompts as tokens.

    Attributes:
        tokens: The tokens of each prompt.
        stops: The tokens that end an answer.
        max_length: Longest prompt with its answer, in tokens.
    """

    def __init__(
        self,
        tokens: Sequence[list[int]],
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[int],
        max_length: int,
        limits: TokenLimits | None,
    ):
        """Takes prompts; those that leave no room for an answer are left out."""
        self.tokens = [ids for ids in tokens if len(ids) + FEWEST_TOKENS <= max_length]
        self.stops = stops
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._padding = padding_of(tokenizer, limits and limits.vocabulary)

    def __len__(self) -> int:
        return len(self.tokens)

    def answered(self, chosen: Sequence[int], answers: Sequence[list[int]]) -> DecoderExamples:
        """Returns examples of chosen prompts with their answers, whose tokens are predicted."""
        sequences = [
            Tokens(
                self.tokens[prompt] + answer,
                [False] * len(self.tokens[prompt]) + [True] * len(answer),
            )
            for prompt, answer in zip(chosen, answers, strict=True)
        ]
        return DecoderExamples(sequences, self._padding, self.max_length)

    def opening(self, answer: Sequence[int], most: int) -> int:
        """Returns the number of tokens of an answer's first sentence, or `most` if it is longer."""
        for count in range(1, min(most, len(answer)) + 1):
            if _SENTENCE_END.search(self._tokenizer.decode(answer[:count])):
                return count
        return min(most, len(answer))


def read_prompts(
    table: Table,
    tokenizer: PreTrainedTokenizerBase,
    *,
    is_chat: bool,
    max_length: int,
    limits: TokenLimits | None = None,
) -> Prompts | None:
    """Reads a table of prompts without answers.

    Args:
        table: The table, with conversations in which the assistant has not spoken, or prompts.
        tokenizer: The base's tokenizer.
        is_chat: True to write a prompt as a user's message in the chat template.
        max_length: Longest prompt with its answer, in tokens.
        limits: The limits of the model's tokens; None for any.

    Returns:
        The prompts; None if the table holds something else.

    Raises:
        InputError: The chat template cannot write a prompt, or a token is none of the model's.
    """
    source, stops = table.source, {tokenizer.eos_token_id}
    if source.messages in table.columns:
        chats = list(table.rows[source.messages])
        if any(_has_answer(chat) for chat in chats):
            return None
    elif source.prompt in table.columns and source.response not in table.columns:
        chats = [[{"role": "user", "content": text}] for text in table.texts(source.prompt)]
        if not is_chat:
            encoded = encode(tokenizer, table.texts(source.prompt), table.name)["input_ids"]
            tokens = without_end(encoded, tokenizer)
            chats = None
    else:
        return None
    if chats is not None:
        texts = [_written(chat, table, tokenizer) for chat in chats]
        tokens = encode(tokenizer, texts, table.name, add_special_tokens=False)["input_ids"]
        reply = {"role": "assistant", "content": PROBE}
        behind = _written([*chats[0], reply], table, tokenizer, asked=False).rpartition(PROBE)[2]
        if behind.strip():
            stops.add(
                encode(tokenizer, [behind], table.name, add_special_tokens=False)["input_ids"][0][0]
            )
    if limits is not None:
        limits.require_encoded({"input_ids": tokens}, table.name)
    known = sorted(stop for stop in stops if stop is not None)
    return Prompts(tokens, tokenizer, known, max_length, limits)


def _has_answer(messages: Any) -> bool:
    """Returns True unless it is a conversation without an assistant's message."""
    if not isinstance(messages, list) or not messages:
        return True
    return any(not isinstance(m, dict) or m.get("role") == "assistant" for m in messages)


def _written(
    messages: Any, table: Table, tokenizer: PreTrainedTokenizerBase, *, asked: bool = True
) -> str:
    """Returns a conversation in the chat template, with what asks for an answer behind it."""
    try:
        return write_chats(tokenizer, [Chat(messages, asked=asked)])[0]
    except ValueError as error:
        raise InputError(
            f"{table.name}: the tokenizer's chat template cannot write {messages!r:.80}: {error}"
        ) from error
