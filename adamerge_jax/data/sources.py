"""The examples that a recipe names, from files, folders and the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adamerge_jax.data.arrays import read_arrays
from adamerge_jax.data.choices import choice_examples
from adamerge_jax.data.end_of_text import PredictsEnd
from adamerge_jax.data.examples import Examples, Subset, drawn
from adamerge_jax.data.image_conversations import ConversationImages
from adamerge_jax.data.images import ImageExamples, ImageProcessor
from adamerge_jax.data.labels import LabelColumn, give_labels
from adamerge_jax.data.language import make_language_examples
from adamerge_jax.data.locations import Arrays, Location, TableFiles, locate_data
from adamerge_jax.data.pairs import TextPairs, pair_scores
from adamerge_jax.data.processors import Processor
from adamerge_jax.data.prompts import Prompts, read_prompts
from adamerge_jax.data.tables import Draw, Table, class_indices, read_table
from adamerge_jax.data.texts import TextExamples
from adamerge_jax.data.token_limits import TokenLimits
from adamerge_jax.data.words import WORDS_COLUMN, word_examples
from adamerge_jax.errors import InputError
from adamerge_jax.models.embedding_form import EmbeddingForm
from adamerge_jax.models.problem import CHOICES, CLASSES, LABELS, NUMBERS, WORDS, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from adamerge_jax.recipes.schema import DataSource


def load_examples(
    source: DataSource,
    *,
    root: Path,
    inputs: Sequence[str],
    preprocessor: PreTrainedTokenizerBase | ImageProcessor | None,
    max_length: int,
    seed: int,
    name: str,
    limits: TokenLimits | None = None,
    language: bool = False,
    decoder_start: int | None = None,
    predicts_end: PredictsEnd = lambda examples: True,
    embeds: EmbeddingForm | None = None,
    processor: Processor | None = None,
    problem: Problem = CLASSES,
    outputs: int = 0,
) -> Examples:
    """Reads the examples of a data source.

    Args:
        source: The data source in the recipe.
        root: Folder that relative paths start from.
        inputs: Names of the model's inputs; the first tells texts from images.
        preprocessor: The checkpoint's tokenizer or image processor; NumPy files need none.
        max_length: Longest text in tokens.
        seed: The seed for drawing examples where `source.limit` is under their number.
        name: Name of the examples in error messages.
        limits: The limits of token ids; None where the inputs are images.
        language: True for a language model.
        decoder_start: The token that the responses of an encoder-decoder start with.
        predicts_end: The language model that is asked about the end of text; by default it is to
            be predicted.
        embeds: The way from texts to embeddings of a sentence embedder; None for other models.
        processor: The processor of a language model that reads images.
        problem: The problem that the task's head solves.
        outputs: The number of outputs of that head; only labels that are no classes need it.

    Raises:
        InputError: The data cannot be found or read, lacks a column, or is empty.
    """
    try:
        location = locate_data(source, root)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    if isinstance(location, Arrays):
        if language:
            raise InputError(
                f"{name}: {source.path}: a language model's data are texts, not NumPy arrays; give "
                "a table (.jsonl, .csv, .parquet) with messages, prompts and responses, or texts"
            )
        if embeds is not None:
            raise InputError(
                f"{name}: {source.path}: a sentence embedder's data are texts, not NumPy arrays; "
                "give a table (.jsonl, .csv, .parquet) with a column of texts, or two of pairs"
            )
        if problem in (WORDS, CHOICES):
            raise InputError(
                f"{name}: {source.path}: the data of an expert that gives {problem.predicts} are "
                "texts, not NumPy arrays; give a table (.jsonl, .parquet) with columns of them"
            )
        examples = read_arrays(location.file, source, inputs, limits, name, problem, outputs)
    elif language:
        wanted = [source.messages, source.prompt, source.response, *_columns(source.text)]
        # Images are decoded to count their tokens, so rows are drawn before that. Packed texts
        # have none, and are drawn when they are packed.
        reads_images = processor is not None and not source.packed
        draw = _draw(source.limit, seed) if reads_images else None
        table = read_table(location, source, name, wanted, draw)
        table.require_rows(preprocessor, "tokenizer")
        examples = make_language_examples(
            table,
            preprocessor,
            max_length=max_length,
            decoder_start=decoder_start,
            predicts_end=predicts_end,
            limits=limits,
            images=processor and ConversationImages(processor),
            folder=_folder_of(location),
        )
    else:
        is_text = inputs[0] == "input_ids"
        columns = _columns(source.text if is_text else source.image)
        others = [WORDS_COLUMN] if problem == WORDS else []
        if problem == CHOICES:
            if source.choices is None:
                raise InputError(
                    f"{name}: choices is missing; name the column of lists of choices, or the "
                    "column of each choice"
                )
            if not isinstance(source.choices, str) and len(source.choices) < 2:
                raise InputError(
                    f"{name}: choices has {len(source.choices)} columns, expected one for each of "
                    "two or more choices, or the name of a column of lists"
                )
            others = _columns(source.choices)
        wanted = list(dict.fromkeys([*columns, *others, source.label or "label"]))
        table = read_table(location, source, name, wanted, _draw(source.limit, seed))
        if problem == WORDS and columns == ["text"] and "text" not in table.columns:
            columns = others
        kind = "tokenizer" if is_text else "image processor (preprocessor_config.json)"
        table.require_rows(preprocessor, kind)
        _require_columns(table, [*columns, *(others if problem == CHOICES else [])])
        if embeds is not None:
            return _embedded_examples(table, preprocessor, max_length, limits, embeds)
        if problem == CHOICES and source.choices is not None:
            return choice_examples(table, columns, source.choices, preprocessor, max_length, limits)
        if problem == WORDS:
            return _words(table, columns, preprocessor, max_length, limits)
        if is_text:
            examples = _text_examples(table, preprocessor, max_length, limits)
        else:
            examples = _image_examples(table, preprocessor)
        return _labelled(examples, table, problem, outputs)
    return examples if source.limit is None else Subset.draw(examples, source.limit, seed)


def load_prompts(
    source: DataSource,
    *,
    root: Path,
    tokenizer: PreTrainedTokenizerBase,
    is_chat: bool,
    max_length: int,
    name: str,
    limits: TokenLimits | None = None,
) -> Prompts | None:
    """Reads the prompts of a data source whose rows have no answers.

    Args:
        source: The data source in the recipe.
        root: Folder that relative paths start from.
        tokenizer: The base's tokenizer.
        is_chat: True to write a prompt as a user's message in the chat template.
        max_length: Longest prompt with its answer, in tokens.
        name: Name of the data in error messages.
        limits: The limits of token ids.

    Returns:
        The prompts; None if the source holds something else.

    Raises:
        InputError: The data cannot be found or read, or a prompt cannot be written as tokens.
    """
    try:
        location = locate_data(source, root)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    if isinstance(location, Arrays):
        return None
    table = read_table(location, source, name, [source.messages, source.prompt, source.response])
    table.require_rows(tokenizer, "tokenizer")
    return read_prompts(table, tokenizer, is_chat=is_chat, max_length=max_length, limits=limits)


def _folder_of(location: Location) -> Path | None:
    """Returns the folder from which a table's names of files start; None for one without."""
    return location.files[0].parent if isinstance(location, TableFiles) else None


def _draw(limit: int | None, seed: int) -> Draw | None:
    """Returns the function that draws rows before they are read, as `Subset.draw` does after."""
    return None if limit is None else lambda size: drawn(size, limit, seed)


def _columns(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _text_examples(
    table: Table,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    limits: TokenLimits | None,
) -> Examples:
    texts = [table.texts(column) for column in _columns(table.source.text)]
    pairs = texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))
    return TextExamples(pairs, tokenizer, max_length, table.name, limits)


def _words(
    table: Table,
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    limits: TokenLimits | None,
) -> Examples:
    if len(columns) > 1:
        raise InputError(
            f"{table.name}: text names two columns, and an expert that gives {WORDS.predicts} "
            "reads one of lists of words; name that"
        )
    return word_examples(table, columns[0], tokenizer, max_length, limits)


def _embedded_examples(
    table: Table,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    limits: TokenLimits | None,
    embeds: EmbeddingForm,
) -> Examples:
    """Returns the texts of a sentence embedder, or pairs of texts with their scores."""
    sides = []
    for column in _columns(table.source.text):
        texts = [embeds.as_read(text) for text in table.texts(column)]
        sides.append(TextExamples(texts, tokenizer, max_length, table.name, limits))
    if len(sides) == 1:
        return sides[0]
    examples = TextPairs(*sides)
    label = table.source.label
    if label is not None:
        examples.scores = pair_scores(
            list(table.rows[label]), table.rows.numbers, label, table.name
        )
    return examples


def _image_examples(table: Table, processor: ImageProcessor) -> Examples:
    column = table.source.image
    if column not in table.rows.images:
        raise InputError(f"{table.name}: column {column!r} of {table.source.path} holds no images")
    return ImageExamples(table.rows[column], processor, table.name, table.rows.numbers)


def _require_columns(table: Table, columns: Sequence[str]) -> None:
    label = table.source.label
    for column in [*columns, *([label] if label else [])]:
        if column not in table.columns:
            raise table.lacks([repr(column)])


def _labelled(examples: Examples, table: Table, problem: Problem, outputs: int) -> Examples:
    """Gives examples the labels and class names of their table."""
    label = table.source.label
    names = table.rows.class_names.get(label or "label")
    values = list(table.rows[label]) if label else []
    if problem in (NUMBERS, LABELS):
        if label:
            where = f"{table.name}: {table.source.path}"
            column = LabelColumn(values, table.rows.numbers, label, where)
            give_labels(examples, column, problem, outputs, names)
        return examples
    if label and all(isinstance(value, str) and value.strip() for value in values):
        names, examples.names_have_order = sorted(set(values)), False
        values = [names.index(value) for value in values]
    if names is not None:
        examples.class_names = [text.replace("_", " ") for text in names]
    if label:
        examples.labels = class_indices(values, table.rows.numbers, table.source, table.name)
        if names is not None and examples.labels.max() >= len(names):
            row = int(np.argmax(examples.labels >= len(names)))
            raise InputError(
                f"{table.name}: {table.source.path}, row {table.rows.numbers[row]}: label "
                f"{examples.labels[row]} has no name; column {label!r} has {len(names)} classes"
            )
    return examples
