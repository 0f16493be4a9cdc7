"""The columns of data that a model reads, by their names and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from adamerge_jax.data.words import WORDS_COLUMN
from adamerge_jax.drafting.samples import Sample

_TEXT = (
    *("text", "sentence", "content", "document", "review", "headline", "title", "question"),
    *("query", "body", "tweet", "comment", "utterance", "description", "phrase", "passage"),
)

_PAIRS = (
    *(("premise", "hypothesis"), ("sentence1", "sentence2"), ("sentence_1", "sentence_2")),
    *(("question1", "question2"), ("text1", "text2"), ("text_a", "text_b"), ("first", "second")),
    *(("anchor", "positive"), ("query", "passage"), ("query", "document"), ("query", "answer")),
    *(("question", "answer"), ("question", "passage"), ("question", "sentence")),
)

_PROMPT = ("prompt", "instruction", "question", "query", "problem", "input", "source")
_RESPONSE = ("response", "completion", "answer", "output", "solution", "target", "reply")
_MESSAGES = ("messages", "conversation", "conversations", "chat", "dialogue")

_LABEL = (
    *("label", "labels", "class", "category", "target", "label_idx", "labelid", "label_id"),
    *("coarse_label", "fine_label", "intent", "topic", "sentiment", "stars", "rating", "y"),
)

_WORDS = ("tokens", "words", "text", "sentence")

_TAGS = ("ner_tags", "tags", "labels", "label", "ner", "entities", "pos_tags", "chunk_tags", "pos")

_NUMBER = (
    *("label", "labels", "score", "value", "target", "rating", "stars", "similarity", "grade"),
    *("similarity_score", "y"),
)

_SCORE = ("score", "label", "similarity", "similarity_score", "relatedness", "relatedness_score")


class Columns(NamedTuple):
    """The columns of one source as fields of its section.

    Attributes:
        fields: The fields, without those that have their default.
        lacks: In words, what the data lack for their part; None if they have it.
    """

    fields: dict[str, Any]
    lacks: str | None = None


def of_language(sample: Sample, *, pairs_only: bool = False) -> Columns:
    """Returns the columns of conversations, of prompts with responses, or of texts.

    Args:
        sample: The first rows.
        pairs_only: True for an encoder-decoder, which reads prompts with responses only.
    """
    texts = sample.texts()
    conversations = [name for name, v in sample.columns.items() if _are_conversations(v)]
    prompt, response = (_named(texts, names) for names in (_PROMPT, _RESPONSE))
    has_pair = prompt is not None and response is not None
    if conversations and not pairs_only:
        messages = _named(conversations, _MESSAGES) or conversations[0]
        return Columns(_without_defaults(messages=messages))
    if has_pair:
        return Columns(_without_defaults(prompt=prompt, response=response))
    if pairs_only:
        return Columns({}, "has no columns of prompts and responses")
    found = _one_text(sample)
    if found.lacks and (turn := _other_turn(sample)):
        lacks = f"has turns of {', '.join(turn)}; a conversation is a list of role and content"
        return Columns({}, lacks)
    return found


def of_texts(sample: Sample) -> Columns:
    """Returns the column of a classifier's texts, or those of its pairs."""
    if sample.arrays:
        return _of_input(sample, "input_ids")
    label = label_of(sample)
    pair = _pair(sample, label)
    return Columns({"text": pair}) if pair else _one_text(sample, label)


def of_images(sample: Sample) -> Columns:
    """Returns the column of images."""
    if sample.arrays:
        return _of_input(sample, "pixel_values")
    image = _named(sorted(sample.images), ("image", "img", "picture", "photo"))
    if image is None:
        if not sample.images:
            return Columns({}, f"has no column of images among {_listed(sample)}")
        image = sorted(sample.images)[0]
    return Columns(_without_defaults(image=image))


def of_embedder(sample: Sample) -> Columns:
    """Returns the columns of pairs of texts, or the one of texts."""
    pair = _pair(sample, None)
    return Columns({"text": pair}) if pair else _one_text(sample)


def of_words(sample: Sample) -> Columns:
    """Returns the column of lists of words."""
    lists = [name for name, values in sample.columns.items() if _are_lists(values, str)]
    words = _named(lists, _WORDS)
    if words is None:
        return Columns({}, f"has no column of lists of words among {_listed(sample)}")
    # Without a name the column `text` comes first.
    is_default = words == WORDS_COLUMN and "text" not in sample.columns
    return Columns({} if is_default else _without_defaults(text=words))


def with_tags(columns: Columns, sample: Sample) -> Columns:
    """Returns columns with that of a class for each word."""
    return _with(columns, _lists_of_classes(sample, columns), _TAGS, "classes of words")


def with_labels(columns: Columns, sample: Sample) -> Columns:
    """Returns columns with that of lists of classes, of which an example may have any number."""
    return _with(columns, _lists_of_classes(sample, columns), _LABEL, "lists of classes")


def with_numbers(columns: Columns, sample: Sample) -> Columns:
    """Returns columns with that of the number, or the numbers, that an expert is to give."""
    numbers = [
        name
        for name, values in sample.columns.items()
        if sample.arrays
        or (values and all(_is_number(value) for value in values))
        or _are_lists(values, int | float)
    ]
    return _with(columns, numbers, _NUMBER, "numbers")


def _lists_of_classes(sample: Sample, columns: Columns) -> list[str]:
    if sample.arrays:
        return list(sample.columns)
    read = columns.fields.get("text", WORDS_COLUMN)
    return [
        name
        for name, values in sample.columns.items()
        if name != read and _are_lists(values, int | str)
    ]


def _with(columns: Columns, found: Sequence[str], names: Sequence[str], kind: str) -> Columns:
    """Returns columns with a label: the column of those found that has the first usual name."""
    label = _named(found, names) or (found[0] if len(found) == 1 else None)
    if columns.lacks or label is None:
        return Columns(columns.fields, columns.lacks or f"has no column of {kind}")
    return Columns(columns.fields | {"label": label})


def _are_lists(values: Sequence[Any], of: Any) -> bool:
    """Returns True for lists of one kind, of which not all are empty."""
    return any(values) and all(
        isinstance(value, list)
        and all(isinstance(member, of) and not isinstance(member, bool) for member in value)
        for value in values
    )


def with_label(columns: Columns, sample: Sample) -> Columns:
    """Returns columns with that of class indices or names, which tests of classifiers need."""
    label = label_of(sample)
    if columns.lacks or label is None:
        return Columns(columns.fields, columns.lacks or "has no column of labels")
    return Columns(columns.fields | {"label": label})


def with_score(columns: Columns, sample: Sample) -> Columns:
    """Returns columns with that of the scores of pairs, where there is one."""
    if columns.lacks is None and isinstance(columns.fields.get("text", ""), str):
        return Columns(columns.fields, "has no pairs of texts")
    numbers = [
        name
        for name, values in sample.columns.items()
        if values and all(_is_number(value) for value in values)
    ]
    score = _named(numbers, _SCORE)
    return Columns(columns.fields | ({"label": score} if score else {}), columns.lacks)


def label_of(sample: Sample) -> str | None:
    """Returns the name of the column of labels; None for none."""
    if sample.arrays:
        return _named(list(sample.columns), _LABEL)
    labels = [
        name
        for name, values in sample.columns.items()
        if name in sample.class_names or (values and all(_is_label(value) for value in values))
    ]
    return _named(labels, _LABEL)


def _are_conversations(values: Sequence[Any]) -> bool:
    return bool(values) and all(
        isinstance(value, list)
        and value
        and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value)
        for value in values
    )


def _other_turn(sample: Sample) -> list[str]:
    """Returns the fields of a turn where conversations are written otherwise; else none."""
    for values in sample.columns.values():
        if values and isinstance(values[0], list) and values[0] and isinstance(values[0][0], dict):
            return list(values[0][0])[:4]
    return []


def _is_label(value: Any) -> bool:
    if isinstance(value, str):
        return 0 < len(value.strip()) <= _LONGEST_LABEL
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_LONGEST_LABEL = 60
"""The number of characters up to which a text may be the name of a class."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _pair(sample: Sample, label: str | None) -> list[str] | None:
    texts = {name.lower(): name for name in sample.texts() if name != label}
    fitting = [pair for pair in _PAIRS if all(name in texts for name in pair)]
    return [texts[name] for name in fitting[0]] if fitting else None


def _one_text(sample: Sample, label: str | None = None) -> Columns:
    texts = [name for name in sample.texts() if name != label]
    if not texts:
        return Columns({}, f"has no column of texts among {_listed(sample)}")

    def length(name: str) -> int:
        return sum(map(len, sample.columns[name]))

    return Columns(_without_defaults(text=_named(texts, _TEXT) or max(texts, key=length)))


def _of_input(sample: Sample, array: str) -> Columns:
    there = array in sample.columns
    return Columns({}, None if there else f"has no array {array} among {_listed(sample)}")


def _named(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """Returns the first of the columns in the order of usual names, whatever their case."""
    by_name = {name.lower(): name for name in reversed(columns)}
    return next((by_name[name] for name in names if name in by_name), None)


def _without_defaults(**fields: str) -> dict[str, Any]:
    return {field: column for field, column in fields.items() if field != column}


def _listed(sample: Sample) -> str:
    return ", ".join(list(sample.columns)[:8]) or "none"
