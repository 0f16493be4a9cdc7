"""The examples that a recipe names, from files, folders and the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adamerge_jax.data.arrays import read_arrays
from adamerge_jax.data.end_of_text import PredictsEnd
from adamerge_jax.data.examples import Examples, Subset
from adamerge_jax.data.images import ImageExamples, ImageProcessor
from adamerge_jax.data.language import make_language_examples
from adamerge_jax.data.tables import Table, class_indices, read_table
from adamerge_jax.data.texts import TextExamples
from adamerge_jax.data.token_limits import TokenLimits
from adamerge_jax.errors import InputError

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

    Raises:
        InputError: The data cannot be found or read, lacks a column, or is empty.
    """
    path = root / Path(source.path).expanduser()
    if path.suffix == ".npz":
        if language:
            raise InputError(
                f"{name}: {source.path}: a language model's data are texts, not NumPy arrays; give "
                "a table (.jsonl, .csv, .parquet) with messages, prompts and responses, or texts"
            )
        examples = read_arrays(path, source, inputs, limits, name)
    else:
        table = read_table(path, source, name)
        if language:
            table.require_rows(preprocessor, "tokenizer")
            examples = make_language_examples(
                table,
                preprocessor,
                max_length=max_length,
                decoder_start=decoder_start,
                predicts_end=predicts_end,
                limits=limits,
            )
        elif inputs[0] == "input_ids":
            examples = _text_examples(table, preprocessor, max_length, limits)
        else:
            examples = _image_examples(table, preprocessor)
    return examples if source.limit is None else Subset.draw(examples, source.limit, seed)


def _text_examples(
    table: Table,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    limits: TokenLimits | None,
) -> Examples:
    column = table.source.text
    columns = [column] if isinstance(column, str) else list(column)
    _require_columns(table, columns)
    table.require_rows(tokenizer, "tokenizer")
    texts = [table.texts(column) for column in columns]
    pairs = texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))
    return _labelled(TextExamples(pairs, tokenizer, max_length, table.name, limits), table)


def _image_examples(table: Table, processor: ImageProcessor | None) -> Examples:
    import datasets

    column = table.source.image
    _require_columns(table, [column])
    table.require_rows(processor, "image processor (preprocessor_config.json)")
    if not isinstance(table.rows.features[column], datasets.Image):
        raise InputError(f"{table.name}: column {column!r} of {table.source.path} holds no images")
    return _labelled(ImageExamples(table.rows[column], processor, table.name), table)


def _require_columns(table: Table, columns: Sequence[str]) -> None:
    label = table.source.label
    for column in [*columns, *([label] if label else [])]:
        if column not in table.columns:
            raise table.lacks([repr(column)])


def _labelled(examples: Examples, table: Table) -> Examples:
    """Gives examples the labels and class names of their table."""
    import datasets

    label = table.source.label
    feature = table.rows.features.get(label or "label")
    if isinstance(feature, datasets.ClassLabel):
        examples.class_names = [text.replace("_", " ") for text in feature.names]
    if label:
        examples.labels = class_indices(table.rows[label], table.source, table.name)
    return examples
