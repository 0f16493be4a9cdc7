"""The numbers and lengths of the examples of each task, without their contents."""

import dataclasses
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int

from adamerge_jax.data.arrays import examples_of_arrays
from adamerge_jax.data.choices import ChoiceExamples
from adamerge_jax.data.examples import Examples
from adamerge_jax.data.locations import is_on_hub
from adamerge_jax.data.packing import token_counts
from adamerge_jax.errors import InputError
from adamerge_jax.models.images_in_text import COUNT, PIXELS, SIZES
from adamerge_jax.pipeline.models import Models
from adamerge_jax.recipes.schema import DataSource

ASSUMED_EXAMPLES = 1000
"""The number of examples of a task without a limit whose data is not on this machine."""

ASSUMED_CHOICES = 4
"""The number of choices of multiple choice whose data is not on this machine."""


@dataclasses.dataclass(frozen=True, eq=False)
class DataSize:
    """The number, lengths and size of one task's examples.

    Attributes:
        lengths: The tokens to which each example alone is padded, `[N]`; 0 for images.
        tokens: The tokens of each text without padding, `[N]`; None where texts cannot be packed.
        stored_bytes: The size of the examples in memory, in bytes.
        images: The shapes of the arrays of a conversation's images by name, such as `[I, ...]`
            pixels; empty where there are none.
        choices: The texts of an example of multiple choice.
        assumed: The reason for which these numbers are assumed; None if they were counted.
    """

    lengths: Int[np.ndarray, " N"]
    tokens: Int[np.ndarray, " N"] | None = None
    stored_bytes: int = 0
    images: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    choices: int = ASSUMED_CHOICES
    assumed: str | None = None

    def __len__(self) -> int:
        """Returns N, the number of examples."""
        return len(self.lengths)

    def limited(self, limit: int | None) -> "DataSize":
        """Returns the sizes of at most `limit` examples, spread over all lengths."""
        if limit is None or limit >= len(self):
            return self
        chosen = np.linspace(0, len(self) - 1, limit).round().astype(int)
        return self._changed(lambda lengths: np.sort(lengths)[chosen])

    def cut(self, max_length: int) -> "DataSize":
        """Returns the sizes of examples of at most so many tokens."""
        return self._changed(lambda lengths: np.minimum(lengths, max_length))

    def _changed(self, change: Callable[[np.ndarray], np.ndarray]) -> "DataSize":
        tokens = None if self.tokens is None else change(self.tokens)
        return dataclasses.replace(self, lengths=change(self.lengths), tokens=tokens)


def data_sizes(
    sources: Mapping[str, DataSource],
    part: str,
    models: Models,
    root: Path,
    max_length: int,
    load: Callable[[DataSource, str, str], Examples],
) -> dict[str, DataSize]:
    """Returns the sizes of the calibration, validation or test data by task.

    Texts on this machine are tokenised. Only the headers of NumPy files are read. Data on the Hub
    is not read: texts count as long as `max_length` allows, and have no images.

    Args:
        sources: The data by task.
        part: `calibration`, `validation` or `test`, for messages.
        models: The base and its experts.
        root: Folder that relative paths start from.
        max_length: Longest text in tokens.
        load: The function `(source, name in messages, task) -> examples`.

    Raises:
        InputError: A file is missing, cannot be read, or holds no examples.
    """
    sizes = {}
    for task, source in sources.items():
        path = root / Path(source.path).expanduser()
        name = f"{part} data of task {task!r}"
        if path.suffix.lower() == ".npz":
            size = _size_of_arrays(path, models.family.inputs[0], name).limited(source.limit)
        elif not is_on_hub(source, root):
            examples = load(source, name, task)
            # Only what is learned from is packed.
            may_be_packed = models.family.packs and part == "calibration"
            size = DataSize(
                examples.padded_lengths(),
                token_counts(examples) if may_be_packed else None,
                images=shapes_of_images(examples),
            )
            if isinstance(examples, ChoiceExamples):
                size = dataclasses.replace(size, choices=len(examples.choices))
        else:
            count = source.limit or ASSUMED_EXAMPLES
            longest = models.family.max_tokens(models.config) or max_length
            is_text = models.family.inputs[0] == "input_ids"
            in_words = " of max_length tokens" if is_text else ""
            if models.family.images is not None:
                in_words += " without images"
            size = DataSize(
                np.full(count, min(max_length, longest) if is_text else 0),
                assumed=f"{source.path} is not on this machine: {count} examples{in_words} are "
                "assumed",
            )
        sizes[task] = size
    return sizes


def shapes_of_images(examples: Examples) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the arrays of a conversation's images by name; none without images."""
    first = np.array([0])
    inputs = examples.take(first, examples.padded_length(first))
    if COUNT not in inputs:
        return {}
    return {name: inputs[name].shape[1:] for name in (PIXELS, SIZES) if name in inputs}


def _size_of_arrays(path: Path, name: str, role: str) -> DataSize:
    """Returns the size of a NumPy file of model inputs, from its headers."""
    if not path.is_file():
        raise InputError(f"{role}: no such file: {path}")
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
            version = np.lib.format.read_magic(stream)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read_header(stream)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{role}: {path} is no .npz file with {name!r} ({reason})") from error
    # An array of that shape that takes no memory.
    examples_of_arrays({name: np.broadcast_to(np.zeros((), dtype), shape)}, path, role)
    lengths = np.full(shape[0], shape[1] if name == "input_ids" else 0)
    return DataSize(lengths, stored_bytes=int(np.prod(shape)) * dtype.itemsize)
