"""Texts in words, each of which has a class: the data of token classification."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from adamerge_jax.data.examples import Cut
from adamerge_jax.data.tables import Table, class_indices
from adamerge_jax.data.texts import TextExamples
from adamerge_jax.data.token_limits import TokenLimits
from adamerge_jax.data.tokenizers import encode
from adamerge_jax.errors import InputError
from adamerge_jax.objectives import NOT_PREDICTED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

WORDS_COLUMN = "tokens"
"""The usual name of the column of words."""


class WordExamples(TextExamples):
    """Texts in words as token ids; the class of a word is read off its first token.

    Attributes:
        labels: Class index of each word, `[N, W]`, `NOT_PREDICTED` for words that do not count and
            behind a text's last word; None where there are none.
    """

    def __init__(
        self,
        words: Sequence[Sequence[str]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        name: str,
        limits: TokenLimits | None = None,
    ):
        """Tokenises all texts and cuts those over `max_length` tokens.

        Args:
            words: The words of each text.
            tokenizer: The tokenizer.
            max_length: Longest text in tokens.
            name: Name of the examples in messages.
            limits: The limits of the model's tokens; None for any.

        Raises:
            InputError: The tokenizer fails, does not say which word a token is of, or gives tokens
                that the model does not have.
        """
        if not tokenizer.is_fast:
            raise InputError(
                f"{name}: the tokenizer ({type(tokenizer).__name__}) does not say which word a "
                "token is of; save the fast one, with its tokenizer.json"
            )
        if not _sets_apart(tokenizer):
            log.warning(
                "%s: the tokenizer reads the words as one, as those of RoBERTa do unless "
                "add_prefix_space is true in their tokenizer_config.json; save it as the experts "
                "were trained with it",
                name,
            )
        self._require_room(tokenizer, max_length, name, is_pair=False)
        # No text has more tokens than are used in fewer words than these.
        shortened = [list(text[:max_length]) for text in words]
        encoded = encode(
            tokenizer,
            shortened,
            name,
            is_split_into_words=True,
            truncation=True,
            max_length=max_length,
        )
        self._keep(encoded, tokenizer, max_length, name, limits)
        self._first_tokens: list[Int[np.ndarray, " W"]] = []
        cut = np.zeros(len(words), bool)
        for row, text in enumerate(shortened):
            of_tokens = encoded.word_ids(row)
            first = np.full(len(text), _NO_TOKEN, np.int32)
            for position in reversed(range(len(of_tokens))):
                word = of_tokens[position]
                if word is not None:
                    first[word] = position
            self._first_tokens.append(first)
            is_full = len(of_tokens) == max_length
            cut[row] = len(text) < len(words[row]) or (is_full and first[-1] == _NO_TOKEN)
        self.cut = Cut(cut, max_length)

    def take_labels(
        self, index: Int[np.ndarray, " B"], length: int
    ) -> Int[np.ndarray, "B T"] | None:
        """Returns the class of each word at its first token, `[B, T]`, else `NOT_PREDICTED`."""
        if self.labels is None:
            return None
        taken = np.full((len(index), length), NOT_PREDICTED, np.int32)
        for row, example in enumerate(index):
            first = self._first_tokens[example]
            labels = self.labels[example, : len(first)]
            is_read = first != _NO_TOKEN
            taken[row, first[is_read]] = labels[is_read]
        return taken

    def take_counted(self, index: Int[np.ndarray, " B"], length: int) -> Bool[np.ndarray, "B T"]:
        """Returns True for the first token of each word that counts."""
        labels = self.take_labels(index, length)
        if labels is not None:
            return labels != NOT_PREDICTED
        counted = np.zeros((len(index), length), bool)
        for row, example in enumerate(index):
            first = self._first_tokens[example]
            counted[row, first[first != _NO_TOKEN]] = True
        return counted


_NO_TOKEN = -1


def word_examples(
    table: Table,
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    limits: TokenLimits | None,
) -> WordExamples:
    """Makes examples of a table with lists of words, and lists of their classes if it has labels.

    Args:
        table: The table; the label's column of its source has classes by number or by name.
        column: The column of words.
        tokenizer: The tokenizer.
        max_length: Longest text in tokens.
        limits: The limits of the model's tokens; None for any.

    Raises:
        InputError: A row has no list of words, or not one class for each of them.
    """
    where = f"{table.name}: {table.source.path}"
    words = list(table.rows[column])
    for number, text in zip(table.rows.numbers, words, strict=True):
        if not isinstance(text, list) or not all(isinstance(word, str) for word in text):
            raise InputError(
                f"{where}, row {number}: column {column!r} holds {text!r:.60}, expected a list of "
                "words"
            )
        if not text:
            raise InputError(f"{where}, row {number}: column {column!r} has no word; leave it out")
    examples = WordExamples(words, tokenizer, max_length, table.name, limits)
    label = table.source.label
    names = table.rows.class_names.get(label or "")
    if label is not None:
        rows = list(table.rows[label])
        for number, text, tags in zip(table.rows.numbers, words, rows, strict=True):
            if not isinstance(tags, list) or len(tags) != len(text):
                given = f"{len(tags)} of them" if isinstance(tags, list) else f"{tags!r:.60}"
                raise InputError(
                    f"{where}, row {number}: column {label!r} holds {given}, expected a class for "
                    f"each of the {len(text)} words"
                )
        if all(_is_name(tag) for tags in rows for tag in tags):
            names, examples.names_have_order = sorted({tag for tags in rows for tag in tags}), False
            by_name = {name: position for position, name in enumerate(names)}
            rows = [[by_name[tag] for tag in tags] for tags in rows]
        # No further words are read: one long text must not make all rows long.
        width = min(max_length, max(map(len, rows)))
        examples.labels = np.full((len(rows), width), NOT_PREDICTED, np.int32)
        for row, (number, tags) in enumerate(zip(table.rows.numbers, rows, strict=True)):
            given = [tag for tag in tags if tag != NOT_PREDICTED]
            indices = class_indices(given, [number] * len(given), table.source, table.name)
            classes = np.full(len(tags), NOT_PREDICTED, np.int32)
            classes[[tag != NOT_PREDICTED for tag in tags]] = indices
            examples.labels[row, : len(tags)] = classes[:width]
        if names is not None and examples.labels.max() >= len(names):
            row = int(np.argmax(examples.labels.max(1) >= len(names)))
            raise InputError(
                f"{where}, row {table.rows.numbers[row]}: label {examples.labels[row].max()} has "
                f"no name; column {label!r} has {len(names)} classes"
            )
    if names is not None:
        examples.class_names = list(names)
    return examples


def _sets_apart(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns True if two words of a list are read as two, not as one without a space."""
    two = tokenizer(["a", "b"], is_split_into_words=True, add_special_tokens=False)
    return " " in tokenizer.decode(two["input_ids"]).strip()


def _is_name(tag: Any) -> bool:
    return isinstance(tag, str) and bool(tag.strip())
