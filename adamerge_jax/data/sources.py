"""Reading examples from files, folders and the Hugging Face Hub."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from adamerge_jax.data.examples import (
    ArrayExamples,
    Examples,
    ImageExamples,
    ImageProcessor,
    Subset,
    TextExamples,
)
from adamerge_jax.data.language import load_language_examples
from adamerge_jax.data.tables import no_column, texts_of
from adamerge_jax.errors import InputError
from adamerge_jax.recipes.schema import DataSource

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


class TokenLimits(NamedTuple):
    """The token ids that a model can read.

    Attributes:
        vocabulary: Number of rows of its table.
        longest: The longest text that it has positions for.
    """

    vocabulary: int
    longest: int

    def require(self, token_ids: Int[np.ndarray, "N T"], where: str) -> None:
        """Refuses token ids that are none of this model's.

        Args:
            token_ids: Of N texts, any array of two axes.
            where: What error messages begin with.

        Raises:
            InputError: They are no whole numbers, too large, or too many.
        """
        if not np.issubdtype(token_ids.dtype, np.integer):
            raise InputError(f"{where}: input_ids are {token_ids.dtype}, expected whole numbers")
        if token_ids.min() < 0 or token_ids.max() >= self.vocabulary:
            raise InputError(
                f"{where}: input_ids go from {token_ids.min()} to {token_ids.max()}, the model's "
                f"tokens from 0 to {self.vocabulary - 1}; they are another tokenizer's"
            )
        if token_ids.shape[1] > self.longest:
            raise InputError(
                f"{where}: input_ids: texts have {token_ids.shape[1]} tokens, the model has "
                f"positions for {self.longest}; truncate them to {self.longest}"
            )


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
) -> Examples:
    """Reads the examples that a recipe names.

    Args:
        source: What the recipe says.
        root: Folder that relative paths start from.
        inputs: Names of the model's inputs; the first tells texts from images.
        preprocessor: The checkpoint's tokenizer or image processor; NumPy files need none.
        max_length: Longest text in tokens.
        seed: Draws the examples where `source.limit` is under their number.
        name: What error messages call these examples.
        limits: Of token ids in NumPy files; None where the inputs are images.
        language: Whether they are for a language model.
        decoder_start: The token that the responses of an encoder-decoder start with.

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
        examples = _load_arrays(path, source, inputs, limits, name)
    else:
        table = _load_table(path, source, name)
        if language:
            _require_rows(table, source, preprocessor, "tokenizer", name)
            examples = load_language_examples(
                table,
                source,
                preprocessor,
                max_length=max_length,
                decoder_start=decoder_start,
                name=name,
            )
            return Subset.draw(examples, source.limit or len(examples), seed)
        examples = _preprocess(table, source, inputs[0], preprocessor, max_length, name)
    return examples if source.limit is None else Subset.draw(examples, source.limit, seed)


_READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}


def is_on_hub(source: DataSource, root: Path) -> bool:
    """Whether data are those of a data set of the Hub, rather than a file or a folder.

    Args:
        source: Where the data are.
        root: Folder that relative paths start from.
    """
    path = root / Path(source.path).expanduser()
    return not path.is_dir() and path.suffix not in (*_READERS, ".npz")


def _load_table(path: Path, source: DataSource, name: str) -> datasets.Dataset:
    """Reads a file, a folder of images, or a data set of the Hub."""
    import datasets

    quiet = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    # `datasets` takes paths as patterns.
    exactly = glob.escape(str(path))
    try:
        if path.is_dir():
            return datasets.load_dataset("imagefolder", data_dir=exactly, split=source.split)
        if path.suffix in _READERS:
            if not path.is_file():
                raise InputError(f"{name}: no such file: {path}")
            if not path.stat().st_size:
                raise InputError(f"{name}: {path} has no examples: it is an empty file")
            reader = _READERS[path.suffix]
            # `None`, `NA` and `nan` are texts too.
            options: dict[str, Any] = {"keep_default_na": False} if reader == "csv" else {}
            if path.suffix == ".tsv":
                options["sep"] = "\t"
            table = datasets.load_dataset(reader, data_files=exactly, split="train", **options)
            if path.suffix == ".tsv":
                _require_no_swallowed_rows(table, path, name)
            return table
        return datasets.load_dataset(source.path, source.config, split=source.split)
    except InputError:
        raise
    except Exception as error:  # `datasets` raises its own, pyarrow's, the Hub's and OS errors
        reason = " ".join(str(error).split()) or type(error).__name__
        where = path if path.exists() else f"{path} is no file, and data set {source.path!r}"
        raise InputError(f"{name}: {where} cannot be read: {reason}") from error
    finally:
        if quiet:
            datasets.enable_progress_bars()


def _require_no_swallowed_rows(table: datasets.Dataset, path: Path, name: str) -> None:
    """Refuses a table in which a lone quotation mark has made one text of several rows.

    Many .tsv files quote nothing, so that a text may begin with one. All columns count: rows are
    lost whichever it is.
    """
    for column in table.column_names:
        for row, text in enumerate(table[column]):
            if isinstance(text, str) and "\t" in text and "\n" in text:
                raise InputError(
                    f"{name}: {path}, row {row}: column {column!r} holds a text with a tab and a "
                    f"line break, {text!r:.60}: most likely several rows, since a quotation mark "
                    "at its beginning is not closed; write the file as .jsonl, or put texts with "
                    "quotation marks in quotes and double the marks within"
                )


def _preprocess(
    table: datasets.Dataset,
    source: DataSource,
    first_input: str,
    preprocessor: PreTrainedTokenizerBase | ImageProcessor | None,
    max_length: int,
    name: str,
) -> Examples:
    """Turns a table into examples for a text or an image model."""
    import datasets

    is_text = first_input == "input_ids"
    columns = [source.image]
    if is_text:
        columns = [source.text] if isinstance(source.text, str) else list(source.text)
    for column in [*columns, *([source.label] if source.label else [])]:
        if column not in table.column_names:
            raise no_column(table, source, name, [repr(column)])
    kind = "tokenizer" if is_text else "image processor (preprocessor_config.json)"
    _require_rows(table, source, preprocessor, kind, name)
    if is_text:
        texts = [texts_of(table, column, source, name) for column in columns]
        pairs = texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))
        examples: Examples = TextExamples(pairs, preprocessor, max_length, name)
    else:
        feature = table.features[source.image]
        if not isinstance(feature, datasets.Image):
            raise InputError(f"{name}: column {source.image!r} of {source.path} holds no images")
        examples = ImageExamples(table[source.image], preprocessor, name)
    label = table.features.get(source.label or "label")
    if isinstance(label, datasets.ClassLabel):
        examples.class_names = [text.replace("_", " ") for text in label.names]
    if source.label:
        examples.labels = _class_indices(table[source.label], source, name)
    return examples


def _require_rows(
    table: datasets.Dataset, source: DataSource, preprocessor: Any, kind: str, name: str
) -> None:
    if not len(table):
        raise InputError(f"{name}: {source.path} has no examples")
    if preprocessor is None:
        raise InputError(f"{name}: neither the base nor an expert comes with a {kind}; save one")


def _load_arrays(
    path: Path, source: DataSource, inputs: Sequence[str], limits: TokenLimits | None, name: str
) -> Examples:
    """Reads model inputs from a NumPy file."""
    if not path.is_file():
        raise InputError(f"{name}: no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # NumPy's own, zipfile's, zlib's and OS errors
        reason = " ".join(str(error).split())
        raise InputError(f"{name}: {path} is no readable .npz file ({reason})") from error
    chosen = {key: array for key, array in arrays.items() if key in inputs}
    if inputs[0] not in chosen:
        raise InputError(
            f"{name}: {path} has no array {inputs[0]!r}; its arrays are {', '.join(arrays)}"
        )
    if source.label and source.label not in arrays:
        raise InputError(f"{name}: {path} has no array {source.label!r} for the labels")
    labels = arrays[source.label] if source.label else None
    examples = examples_of_arrays(chosen, path, name, () if labels is None else (labels,))
    if limits is not None:
        limits.require(chosen["input_ids"], f"{name}: {path}")
    if labels is not None:
        examples.labels = _class_indices(labels.tolist(), source, name)
    return examples


def examples_of_arrays(
    inputs: dict[str, np.ndarray], path: Path, name: str, others: Sequence[np.ndarray] = ()
) -> ArrayExamples:
    """The examples that the arrays of a NumPy file are, if they are any.

    Args:
        inputs: The model's inputs among them; only shapes are looked at.
        path: The file.
        name: What error messages call these examples.
        others: Further arrays that must have as many rows.

    Raises:
        InputError: There is no example, the arrays differ in their number, or texts in their
            number of tokens.
    """
    sizes = {array.shape[:1] for array in (*inputs.values(), *others)}
    if len(sizes) != 1 or sizes == {()}:
        raise InputError(f"{name}: the arrays of {path} differ in their number of examples")
    if sizes == {(0,)}:
        raise InputError(f"{name}: {path} has no examples")
    try:
        return ArrayExamples(inputs)
    except InputError as error:
        raise InputError(f"{name}: {path}: {error}") from error


def _class_indices(values: Sequence[Any], source: DataSource, name: str) -> Int[np.ndarray, " N"]:
    values = list(values)
    wrong = [
        row
        for row, value in enumerate(values)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0
    ]
    if wrong:
        # One empty cell of a CSV file makes texts of all numbers in its column.
        row = next((row for row in wrong if values[row] == ""), wrong[0])
        raise InputError(
            f"{name}: label column {source.label!r} of {source.path} must hold class indices "
            f"0, 1, ...; row {row} holds {values[row]!r}"
        )
    return np.array(values, np.int32)
