"""Conversations as tokens, of which the assistant's are to be predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from adamerge_jax.data.chat_templates import Chat, Messages, write_chats
from adamerge_jax.data.tables import Table
from adamerge_jax.data.tokenizers import encode
from adamerge_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from adamerge_jax.recipes.schema import DataSource

PROBE = "\N{OBJECT REPLACEMENT CHARACTER}"
"""A response whose end is the template's alone."""


class Tokens(NamedTuple):
    """A sequence of tokens.

    Attributes:
        ids: Token ids.
        predicted: True for each token that is to be predicted from those before it.
        ends: The positions of predicted tokens that are an end, not part of a text or response.
    """

    ids: list[int]
    predicted: list[bool]
    ends: Sequence[int] = ()


class Marked(NamedTuple):
    """A conversation as the chat template writes it.

    Attributes:
        text: The text.
        predicted: The beginnings and ends, in characters, of what is to be predicted; None for all.
        responses: Those of the assistant's responses alone.
    """

    text: str
    predicted: list[tuple[int, int]] | None
    responses: list[tuple[int, int]]

    def tokens(self, ids: list[int], offsets: Sequence[tuple[int, int]]) -> Tokens:
        """Marks the tokens of the text.

        Args:
            ids: The tokens.
            offsets: The beginning and the end of each, in characters of the text.
        """
        if self.predicted is None:
            return Tokens(ids, [True] * len(ids))
        predicted, content = (
            [any(first < end and start < last for first, last in parts) for start, end in offsets]
            for parts in (self.predicted, self.responses)
        )
        pairs = enumerate(zip(predicted, content, strict=True))
        ends = [at for at, (counts, is_content) in pairs if counts and not is_content]
        return Tokens(ids, predicted, ends)


def conversations(
    table: Table, tokenizer: PreTrainedTokenizerBase, *, with_end: bool
) -> list[Tokens]:
    """Writes conversations in the tokenizer's chat template; responses are predicted.

    Args:
        table: The table; its column `source.messages` holds the conversations.
        tokenizer: The tokenizer with the template.
        with_end: True to predict what the template puts behind a response, too.

    Raises:
        InputError: The tokenizer cannot tell the tokens of responses, a row is no conversation or
            holds images, or the template does not write it.
    """
    require_offsets(tokenizer, table.name)
    sequences = []
    for row, messages in enumerate(table.rows[table.source.messages]):
        where = f"{table.name}: {table.source.path}, row {row}"
        _require_texts(messages, where)
        marked = mark_responses(messages, where, table.source, tokenizer, with_end=with_end)
        encoded = encode(
            tokenizer, [marked.text], where, add_special_tokens=False, return_offsets_mapping=True
        )
        sequences.append(marked.tokens(encoded["input_ids"][0], encoded["offset_mapping"][0]))
    return sequences


def _require_texts(messages: Any, where: str) -> None:
    """Refuses a conversation with images, which a chat template would leave out."""
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and part.get("type") in ("image", "image_url", "video"):
                raise InputError(
                    f"{where}: a message holds a part of type {part['type']!r}, and this model is "
                    "learned from texts alone; leave the row out"
                )


def require_offsets(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuses a tokenizer that does not say which characters a token stands for.

    Args:
        tokenizer: The tokenizer.
        name: Name of the examples in the error message.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{name}: the tokenizer ({type(tokenizer).__name__}) does not say which "
            "characters a token stands for, so conversations cannot be used; give prompts and "
            "responses"
        )


def mark_responses(
    messages: Any,
    where: str,
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    with_end: bool,
) -> Marked:
    """Writes one conversation in the chat template, and finds the responses in it.

    Args:
        messages: The conversation.
        where: Its place in error messages.
        source: The data source, which says what is to be predicted.
        tokenizer: The tokenizer with the template.
        with_end: True to predict what the template puts behind a response, too.

    Raises:
        InputError: It is no conversation, or the template does not write it.
    """
    roles = [
        message.get("role") if isinstance(message, dict) else None
        for message in (messages if isinstance(messages, list) else [messages])
    ]
    if not roles or not all(isinstance(role, str) for role in roles):
        raise InputError(
            f"{where}: column {source.messages!r} is to hold a list of messages, each with a role "
            f"and content; it holds {messages!r:.80}"
        )
    turns = []
    if source.predict == "response":
        # What a conversation opens with answers nothing.
        turns = [turn for turn, role in enumerate(roles) if role == "assistant" and turn > 0]
    chats = [Chat(messages), *(chat for turn in turns for chat in _chats_of(messages, turn))]
    try:
        whole, *written = write_chats(tokenizer, chats)
    except ValueError as error:
        raise InputError(
            f"{where}: the tokenizer's chat template cannot write this conversation: {error}"
        ) from error
    parts = list(zip(written[::3], written[1::3], written[2::3], strict=True))
    if not all(whole.startswith(answered) for _, answered, _ in parts):
        raise InputError(
            f"{where}: the chat template rewrites earlier turns, so the assistant's tokens cannot "
            "be told; give one turn per example, or set predict: all"
        )
    if source.predict == "all":
        return Marked(whole, None, [])
    spans, responses = [], []
    for asked, answered, probed in parts:
        # What asks for an answer may go on where the answer itself does not, e.g. with `<think>`.
        first, last = _count_shared(asked, whole), len(answered)
        behind = probed.rpartition(PROBE)[2]
        # What ends otherwise, as calls of tools may, ends by tokens of its own.
        response = last - len(behind) if answered.endswith(behind) else last
        responses.append((first, response))
        spans.append((first, last if with_end else response))
    return Marked(whole, spans, responses)


def _chats_of(messages: Messages, turn: int) -> tuple[Chat, Chat, Chat]:
    """Returns a conversation up to a response, with it, and with another response in its place."""
    in_parts = isinstance(messages[turn].get("content"), list)
    content = [{"type": "text", "text": PROBE}] if in_parts else PROBE
    probe = {"role": messages[turn]["role"], "content": content}
    return (
        Chat(messages[:turn], asked=True),
        Chat(messages[: turn + 1]),
        Chat([*messages[:turn], probe]),
    )


def _count_shared(first: str, second: str) -> int:
    """Returns the number of characters that two texts share at their beginning."""
    pairs = zip(first, second, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
