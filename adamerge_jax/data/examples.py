"""Examples of a task as model inputs.

Texts are tokenised once. Images are opened and preprocessed when they are first asked for and
kept while there is room. NumPy files hold model inputs as they are.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from adamerge_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ImageProcessor = Callable[..., Mapping[str, Any]]
"""An image processor of `transformers`, of `images` and `return_tensors`. Importing its class would
take every command a second or more, since that imports much of PyTorch."""

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

    def take_labels(
        self, index: Int[np.ndarray, " B"], length: int
    ) -> Int[np.ndarray, "B ..."] | None:
        """What is right of the chosen examples.

        Returns:
            The class index of each, `[B]`, or None where there are no labels. For a language
            model the token that each of `length` positions is to predict, `[B, T]`, or
            `NOT_PREDICTED`.
        """
        return None if self.labels is None else self.labels[index]


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
        ids, mask = padded([self._ids[i] for i in index], length, self._padding)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._types is not None:
            inputs["token_type_ids"], _ = padded([self._types[i] for i in index], length, 0)
        return inputs


class ImageExamples(Examples):
    """Images through the checkpoint's own image processor."""

    def __init__(self, images: Sequence[Any], processor: ImageProcessor, name: str):
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


_COMPLETED = {"attention_mask": np.ones_like, "token_type_ids": np.zeros_like}
"""Inputs that a text may lack, and how they are made of its token ids: without a mask nothing is
padding, without types all are 0."""


class ArrayExamples(Examples):
    """Model inputs as they are, and labels where there are some.

    Token ids of texts, `[N, T]`, are padded where the texts of other tasks are longer.

    Attributes:
        labels: Class index of each example, `[N]`, or None.

    Examples:
        >>> import numpy as np
        >>> from adamerge_jax import ArrayExamples
        >>> examples = ArrayExamples({"images": np.zeros((10, 8, 8))}, labels=np.arange(10))
        >>> len(examples), examples.take(np.array([3, 4]), length=0)["images"].shape
        (10, (2, 8, 8))
    """

    def __init__(self, inputs: dict[str, np.ndarray], labels: Int[np.ndarray, " N"] | None = None):
        """Takes the inputs, `[N, ...]` by the name under which the model reads them.

        Raises:
            InputError: Inputs and labels differ in their number of examples, or the arrays of
                texts in their number of tokens.
        """
        sizes = {name: len(array) for name, array in inputs.items()}
        if labels is not None:
            sizes["labels"] = len(labels)
        if len(set(sizes.values())) > 1:
            found = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise InputError(f"examples differ in number ({found}); expected as many of each")
        tokens = {name: inputs[name].shape for name in ("input_ids", *_COMPLETED) if name in inputs}
        if any(len(shape) != 2 for shape in tokens.values()) or len(set(tokens.values())) > 1:
            found = ", ".join(f"{name} {shape}" for name, shape in tokens.items())
            raise InputError(
                f"token arrays have the shapes {found}; expected (examples, tokens), for all the "
                "same"
            )
        self._inputs = inputs
        # With a decoder's inputs beside them, texts have two lengths.
        is_text = "input_ids" in inputs and inputs.keys() <= {"input_ids", *_COMPLETED}
        self._length = inputs["input_ids"].shape[1] if is_text else 0
        self.labels = labels

    def __len__(self) -> int:
        return len(next(iter(self._inputs.values())))

    def padded_length(self, index: Int[np.ndarray, " B"]) -> int:
        return self._length

    def take(self, index: Int[np.ndarray, " B"], length: int) -> dict[str, np.ndarray]:
        taken = {name: array[index] for name, array in self._inputs.items()}
        if not self._length or length <= self._length:
            return taken
        missing = [(0, 0), (0, length - self._length)]
        whole = completed(taken, ["attention_mask"])
        return {name: np.pad(array, missing) for name, array in whole.items()}


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

    def take_labels(
        self, index: Int[np.ndarray, " B"], length: int
    ) -> Int[np.ndarray, "B ..."] | None:
        return self._examples.take_labels(self._index[index], length)


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
        return joined([part.take(own, length) for part, own in self._places(index)])


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Model inputs of several sets of examples, one behind the other.

    A mask or token types that only some have are completed for the others.

    Args:
        parts: Inputs `[B, ...]` by name, of the same shapes but for B.
    """
    names = dict.fromkeys(name for part in parts for name in part)
    whole = [completed(part, names) for part in parts]
    return {name: np.concatenate([part[name] for part in whole]) for name in names}


def completed(inputs: Mapping[str, np.ndarray], names: Iterable[str]) -> dict[str, np.ndarray]:
    """Inputs with all of these names, as far as they can be made of the token ids."""
    made = dict(inputs)
    for name in names:
        if name not in made and name in _COMPLETED and "input_ids" in made:
            made[name] = _COMPLETED[name](made["input_ids"])
    return made


def require_joinable(examples: Mapping[str, Examples]) -> None:
    """Refuses tasks whose examples cannot share a batch.

    Args:
        examples: At least one of each task.

    Raises:
        InputError: Says which tasks, and what is unlike.
    """
    first = np.array([0])
    length = max(data.padded_length(first) for data in examples.values())
    taken = {task: data.take(first, length) for task, data in examples.items()}
    names = dict.fromkeys(name for part in taken.values() for name in part)
    whole = {task: completed(part, names) for task, part in taken.items()}
    for name in names:
        having = {task: part[name].shape[1:] for task, part in whole.items() if name in part}
        task, shape = next(iter(having.items()))
        for other in whole:
            if other not in having:
                raise InputError(
                    f"calibration data of task {other!r} has no {name!r}, that of task {task!r} "
                    "has; tasks share batches, so give it for every task or for none"
                )
            if having[other] != shape:
                raise InputError(
                    f"calibration data: an example's {name} has shape {shape} in task {task!r} "
                    f"and {having[other]} in task {other!r}; tasks share batches, so give all "
                    "tasks arrays of one shape"
                )


def padded(
    rows: Sequence[Sequence[int]], length: int, filler: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Rows filled up to `length` at their end, and a mask with 1 where there is no filler."""
    out = np.full((len(rows), length), filler, np.int32)
    mask = np.zeros((len(rows), length), np.int32)
    for position, row in enumerate(rows):
        out[position, : len(row)] = row
        mask[position, : len(row)] = 1
    return out, mask


def bucket_length(length: int) -> int:
    """The shortest of 16, 24, 32, 48, 64, 96, 128, ... that holds `length` tokens."""
    size = 16
    while size < length:
        size += size // 2 if size & (size - 1) == 0 else size // 3
    return size
