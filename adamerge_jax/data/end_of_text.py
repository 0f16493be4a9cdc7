"""The end of a language model's texts: the token that stands there, and its place in the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from adamerge_jax.data.conversations import Tokens
from adamerge_jax.data.examples import EndOfText, Examples
from adamerge_jax.data.tables import Table
from adamerge_jax.data.token_limits import TokenLimits
from adamerge_jax.data.tokenizers import encode
from adamerge_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASKED_EXAMPLES = 8
"""The number of examples on which an expert is asked about the end of text."""

PredictsEnd = Callable[[Examples], bool]
"""From a few examples with the end of text behind each to the answer of a task's expert, True if
it predicts that token there."""


def end_of_chats(table: Table) -> EndOfText:
    """Returns the end of conversations: a template writes one, whatever experts have learned."""
    source = table.source
    if source.predict == "response":
        return "append" if source.end_of_text == "append" else "leave"
    if source.end_of_text == "leave":
        raise InputError(
            f"{table.name}: with predict: all, all that the chat template writes counts, the ends "
            "of responses too; leave out end_of_text: leave, or predict: all"
        )
    return "append"


def end_token(
    table: Table, tokenizer: PreTrainedTokenizerBase, limits: TokenLimits | None
) -> int | None:
    """Returns the token behind a text; None if there is none, or if it is not to be predicted."""
    asked, token = table.source.end_of_text, tokenizer.eos_token_id
    if asked == "leave" or (asked == "auto" and token is None):
        return None
    if token is None:
        raise InputError(
            f"{table.name}: end_of_text is append, but the tokenizer has no eos_token; add it to "
            "tokenizer_config.json, or set end_of_text: leave"
        )
    if limits is not None:
        limits.require_encoded({"input_ids": [[token]]}, f"{table.name}: end of text")
    return token


def without_end(
    encoded: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Returns texts without the end of text that some tokenizers add to every text."""
    added = encode(tokenizer, [""], "the tokenizer")["input_ids"][0]
    if not added or added[-1] != tokenizer.eos_token_id:
        return list(encoded)
    return [ids[:-1] for ids in encoded]


def ended(tokens: Tokens, end: int) -> Tokens:
    """Adds the end of text, which is to be predicted too, unless the text itself has it."""
    if tokens.ids and tokens.ids[-1] == end:
        return tokens
    return Tokens([*tokens.ids, end], [*tokens.predicted, True], [len(tokens.ids)])
