"""Examples of a task as model inputs, from files, folders and the Hugging Face Hub.

Texts are tokenised once. Images are opened and preprocessed when they are first asked for and
kept while there is room. NumPy files hold model inputs as they are.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from jaxtyping import Float, Int
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from adamerge_jax.errors import InputError
from adamerge_jax.recipes import DataSource

log = logging.getLogger(__name__)

IMAGE_CACHE_BYTES = 2**30
"""Preprocessed images that one `ImageExamples` keeps in memory."""


class Examples(ABC):
    """Examples of one task.

    Attributes:
        labels: Class index of each example, `[N]`, or None where there are none.
        class_names: Names of the classes as the data set gives them, or None.
    """

    labels: Int[np.ndarray, " N"] | None = None
    class_names: list[str] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    def padded_length(self, index: Int[np.ndarray, " B"]) -> int:
        """Tokens that the chosen examples are to be padded to; 0 where inputs have one shape."""
        return 0

    def padded_lengths(self) -> Int[np.ndarray, " N"]:
        """Tokens that each example alone is to be padded to."""
        return np.array([self.padded_length(np.array([i])) for i in range(len(self))])

    @abstractmethod
    def take(self, index: Int[np.ndarray, " B"], length: int) -> dict[str, np.ndarray]:
        """Model inputs of the chosen examples, `[B, ...]`, texts padded to `length` tokens."""


class TextExamples(Examples):
    """Texts as token ids."""

    def __init__(
        self,
        texts: Sequence[str] | Sequence[tuple[str, str]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        name: str,
    ):
        """Tokenises all texts, cutting those over `max_length` tokens and saying how many."""
        first, second = texts, None
        if not isinstance(texts[0], str):
            first, second = map(list, zip(*texts, strict=True))
        encoded = tokenizer(first, second, truncation=True, max_length=max_length)
        self._ids: list[list[int]] = encoded["input_ids"]
        self._types: list[list[int]] | None = encoded.get("token_type_ids")
        self._padding = tokenizer.pad_token_id
        self._max_length = max_length
        cut = sum(len(ids) == max_length for ids in self._ids)
        if cut:
            log.warning("%s: %d of %d texts reach max_length=%d", name, cut, len(self), max_length)

    def __len__(self) -> int:
        return len(self._ids)

    def padded_length(self, index: Int[np.ndarray, " B"]) -> int:
        longest = max(len(self._ids[i]) for i in index)
        return min(bucket_length(longest), self._max_length)

    def take(self, index: Int[np.ndarray, " B"], length: int) -> dict[str, np.ndarray]:
        def padded(rows: list[list[int]], filler: int) -> Int[np.ndarray, "B T"]:
            out = np.full((len(index), length), filler, np.int32)
            for row, i in zip(out, index, strict=True):
                row[: len(rows[i])] = rows[i]
            return out

        inputs = {"input_ids": padded(self._ids, self._padding)}
        lengths = np.array([len(self._ids[i]) for i in index])
        inputs["attention_mask"] = (np.arange(length) < lengths[:, None]).astype(np.int32)
        if self._types is not None:
            inputs["token_type_ids"] = padded(self._types, 0)
        return inputs


class ImageExamples(Examples):
    """Images through the checkpoint's own image processor."""

    def __init__(self, images: Sequence[Any], processor: BaseImageProcessor, name: str):
        self._name = name
        self._images = images
        self._processor = processor
        self._kept: dict[int, Float[np.ndarray, "channels height width"]] = {}
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self._images)

    def take(self, index: Int[np.ndarray, " B"], length: int) -> dict[str, np.ndarray]:
        return {"pixel_values": np.stack([self._pixels(int(i)) for i in index])}

    def _pixels(self, index: int) -> Float[np.ndarray, "channels height width"]:
        if index in self._kept:
            return self._kept[index]
        try:
            image = self._images[index].convert("RGB")
        except Exception as error:  # Pillow raises errors of many types
            reason = " ".join(str(error).split())
            raise InputError(f"{self._name}, image {index}: cannot be read: {reason}") from error
        pixels = self._processor(images=[image], return_tensors="np")["pixel_values"][0]
        if self._kept_bytes + pixels.nbytes <= IMAGE_CACHE_BYTES:
            self._kept[index] = pixels
            self._kept_bytes += pixels.nbytes
        return pixels


class ArrayExamples(Examples):
    """Model inputs as they are, `[N, ...]` by input name."""

    def __init__(self, inputs: dict[str, np.ndarray]):
        self._inputs = inputs

    def __len__(self) -> int:
        return len(next(iter(self._inputs.values())))

    def take(self, index: Int[np.ndarray, " B"], length: int) -> dict[str, np.ndarray]:
        return {name: array[index] for name, array in self._inputs.items()}


def sorted_batches(
    examples: Examples, batch_size: int
) -> Iterator[tuple[Int[np.ndarray, " n"], dict[str, np.ndarray]]]:
    """All examples in batches of one size, those of like length together: little is padding.

    Yields:
        The indices of n examples, and model inputs `[batch_size, ...]`, of which the first n count:
        the last batch repeats some of its own.
    """
    order = np.argsort(examples.padded_lengths(), kind="stable")
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        full = np.resize(index, batch_size)
        yield index, examples.take(full, examples.padded_length(full))


class Subset(Examples):
    """Some of the examples."""

    def __init__(self, examples: Examples, index: Int[np.ndarray, " N"]):
        self._examples = examples
        self._index = index
        self.class_names = examples.class_names
        self.labels = None if examples.labels is None else examples.labels[index]

    @classmethod
    def draw(cls, examples: Examples, limit: int, seed: int) -> Examples:
        """At most `limit` of the examples, drawn at random, in their order."""
        if limit >= len(examples):
            return examples
        chosen = np.random.default_rng(seed).permutation(len(examples))[:limit]
        return cls(examples, np.sort(chosen))

    def __len__(self) -> int:
        return len(self._index)

    def padded_length(self, index: Int[np.ndarray, " B"]) -> int:
        return self._examples.padded_length(self._index[index])

    def take(self, index: Int[np.ndarray, " B"], length: int) -> dict[str, np.ndarray]:
        return self._examples.take(self._index[index], length)


class Concatenated(Examples):
    """Examples of several sets, one set after the other."""

    def __init__(self, parts: Sequence[Examples]):
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _places(self, index: Int[np.ndarray, " B"]) -> list[tuple[Examples, np.ndarray]]:
        """The set of each example and its index there, as arrays of one."""
        which = np.searchsorted(self._starts, index, side="right") - 1
        own = index - self._starts[which]
        return [(self._parts[part], own[[row]]) for row, part in enumerate(which)]

    def padded_length(self, index: Int[np.ndarray, " B"]) -> int:
        return max(part.padded_length(own) for part, own in self._places(index))

    def take(self, index: Int[np.ndarray, " B"], length: int) -> dict[str, np.ndarray]:
        rows = [part.take(own, length) for part, own in self._places(index)]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def bucket_length(length: int) -> int:
    """The shortest of 16, 24, 32, 48, 64, 96, 128, ... that holds `length` tokens."""
    size = 16
    while size < length:
        size += size // 2 if size & (size - 1) == 0 else size // 3
    return size


def load_examples(
    source: DataSource,
    *,
    root: Path,
    inputs: Sequence[str],
    preprocessor: PreTrainedTokenizerBase | BaseImageProcessor | None,
    max_length: int,
    seed: int,
    name: str,
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

    Raises:
        InputError: The data cannot be found or read, lacks a column, or is empty.
    """
    path = root / Path(source.path).expanduser()
    if path.suffix == ".npz":
        examples = _load_arrays(path, source, inputs, name)
    else:
        table = _load_table(path, source, name)
        examples = _preprocess(table, source, inputs[0], preprocessor, max_length, name)
    return examples if source.limit is None else Subset.draw(examples, source.limit, seed)


_READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}


def _load_table(path: Path, source: DataSource, name: str) -> datasets.Dataset:
    """Reads a file, a folder of images, or a data set of the Hub."""
    quiet = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if path.is_dir():
            return datasets.load_dataset("imagefolder", data_dir=str(path), split=source.split)
        if path.suffix in _READERS:
            if not path.is_file():
                raise InputError(f"{name}: no such file: {path}")
            if not path.stat().st_size:
                raise InputError(f"{name}: {path} has no examples: it is an empty file")
            options = {"sep": "\t"} if path.suffix == ".tsv" else {}
            reader = _READERS[path.suffix]
            return datasets.load_dataset(reader, data_files=str(path), split="train", **options)
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


def _preprocess(
    table: datasets.Dataset,
    source: DataSource,
    first_input: str,
    preprocessor: PreTrainedTokenizerBase | BaseImageProcessor | None,
    max_length: int,
    name: str,
) -> Examples:
    """Turns a table into examples for a text or an image model."""
    is_text = first_input == "input_ids"
    columns = [source.image]
    if is_text:
        columns = [source.text] if isinstance(source.text, str) else list(source.text)
    for column in [*columns, *([source.label] if source.label else [])]:
        if column not in table.column_names:
            raise InputError(
                f"{name}: {source.path} has no column {column!r}; "
                f"its columns are {', '.join(table.column_names)}"
            )
    if not len(table):
        raise InputError(f"{name}: {source.path} has no examples")
    if preprocessor is None:
        kind = "tokenizer" if is_text else "image processor (preprocessor_config.json)"
        raise InputError(f"{name}: neither the base nor an expert comes with a {kind}; save one")
    if is_text:
        texts = [list(table[column]) for column in columns]
        for column, values in zip(columns, texts, strict=True):
            for row, text in enumerate(values):
                if not isinstance(text, str):
                    raise InputError(
                        f"{name}: {source.path}, row {row}: column {column!r} holds {text!r}, "
                        "expected a text"
                    )
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


def _load_arrays(path: Path, source: DataSource, inputs: Sequence[str], name: str) -> Examples:
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
    sizes = {array.shape[:1] for array in chosen.values()}
    if labels is not None:
        sizes.add(labels.shape[:1])
    if len(sizes) != 1 or sizes == {()}:
        raise InputError(f"{name}: the arrays of {path} differ in their number of examples")
    if sizes == {(0,)}:
        raise InputError(f"{name}: {path} has no examples")
    examples = ArrayExamples(chosen)
    if labels is not None:
        examples.labels = _class_indices(labels.tolist(), source, name)
    return examples


def _class_indices(values: Sequence[Any], source: DataSource, name: str) -> Int[np.ndarray, " N"]:
    values = list(values)
    for row, value in enumerate(values):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise InputError(
                f"{name}: label column {source.label!r} of {source.path} must hold class indices "
                f"0, 1, ...; row {row} holds {value!r}"
            )
    return np.array(values, np.int32)
