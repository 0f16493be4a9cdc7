"""A safetensors file: its header, and the values of its tensors, part by part.

Values are read from and written to the file directly: no part is mapped into memory or copied, and
several threads may read at once. Files are checked by the `safetensors` library.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from adamerge_jax.errors import InputError, and_more, in_one_line

STORED_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""NumPy dtypes by their names in a safetensors file."""

_NAMES_OF_DTYPES = {np.dtype(dtype): name for name, dtype in STORED_DTYPES.items()}

_HEADER_ALIGNMENT = 8  # bytes, of the format

_LARGEST_HEADER = 10**8
"""The size of a header in bytes that the `safetensors` library reads."""

_LONGEST_NAME = 1000  # characters, of a tensor; files of some systems have names of 300

_MOST_AXES = 32
_LONGEST_AXIS = 2**48  # more entries than any memory holds, even along an axis beside an empty one

_AGAIN = "copy or download it again"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in the header of a safetensors file.

    Tensors that are stored in another form than as plain numbers are of subclasses.

    Attributes:
        shape: The tensor's shape.
        dtype: The dtype that it is read in: here that which it is stored in.
        file: The file that it is in.
        start: The byte of the file at which its values begin.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    start: int

    @property
    def merged_dtype(self) -> np.dtype:
        """The dtype that a merge with this tensor in its base has by default."""
        return self.dtype

    @property
    def stored(self) -> Mapping[str, TensorInfo]:
        """The plain numbers in the files that it is made of, for its fingerprint.

        They are by that which the fingerprint puts behind the tensor's name to tell them apart: ''
        for the tensor itself, and the scales of 8-bit numbers by their own name in the file.
        """
        return {"": self}

    def part(self, first: int, shape: tuple[int, ...]) -> TensorInfo:
        """Returns the tensor of a shape that begins at the entry `first` of this one, flattened."""
        start = self.start + first * self.dtype.itemsize
        return dataclasses.replace(self, shape=shape, start=start)

    def read(self, name: str, first: int, out: Shaped[np.ndarray, " N"]) -> None:
        """Reads the entries `first : first + N` of the flattened tensor.

        Args:
            name: The tensor's name, for messages.
            first: The first of the entries.
            out: The array to fill, without gaps, of the dtype `dtype`.

        Raises:
            InputError: The file is gone, or was cut off after its header was read.
        """
        with open_weights(self.file) as stream:
            read_entries(stream, name, self, first, out)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Returns the tensors of a safetensors file by name.

    Raises:
        InputError: The file is damaged, or holds a dtype that cannot be read.
    """
    try:
        with safe_open(file, framework="np") as tensors:
            names = list(tensors.keys())
    except SafetensorError as error:
        raise InputError(f"{file} {_why_unreadable(file, error)}") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {in_one_line(error)}") from error
    # safetensors has checked the file; it does not tell the offsets of values.
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entries = json.loads(stream.read(length))
    for name in names:
        require_possible(file, name, entries[name]["shape"])
    unreadable = [name for name in names if entries[name]["dtype"] not in STORED_DTYPES]
    if unreadable:
        raise InputError(
            f"{file}: {unreadable[0]} is stored as {entries[unreadable[0]]['dtype']}"
            f"{and_more(len(unreadable) - 1)}, which cannot be read; save the model in float32, "
            "float16 or bfloat16"
        )
    return {
        name: TensorInfo(
            tuple(entries[name]["shape"]),
            np.dtype(STORED_DTYPES[entries[name]["dtype"]]),
            file,
            8 + length + entries[name]["data_offsets"][0],
        )
        for name in names
    }


def require_possible(file: Path, name: str, shape: list[int]) -> None:
    """Refuses a name that no message can show in a line, and a shape that no array has.

    Raises:
        InputError: With the name or the shape.
    """
    if not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
        raise InputError(
            f"{file} has a tensor called {name[:40]!r} ({len(name)} characters); expected names of "
            f"parameters: printable, at most {_LONGEST_NAME} characters"
        )
    if len(shape) > _MOST_AXES or max(shape, default=0) > _LONGEST_AXIS:
        raise InputError(
            f"{file} has {name} with {len(shape)} axes of up to {max(shape)} entries; expected at "
            f"most {_MOST_AXES} axes of {_LONGEST_AXIS} entries"
        )


@contextmanager
def open_weights(file: Path) -> Iterator[RawIOBase]:
    """Opens a file for `read_entries`.

    Raises:
        InputError: It cannot be opened, or reading in the block fails.
    """
    try:
        with file.open("rb", buffering=0) as stream:
            yield stream
    except OSError as error:
        raise InputError(f"{file} cannot be read: {in_one_line(error)}") from error


def read_entries(
    stream: RawIOBase, name: str, info: TensorInfo, first: int, out: Shaped[np.ndarray, " N"]
) -> None:
    """Reads the entries `first : first + N` of a flattened tensor into `out`.

    Raises:
        InputError: The file was cut off after its header was read.
    """
    stream.seek(info.start + first * info.dtype.itemsize)
    left = memoryview(out.view(np.uint8))
    while left:
        count = stream.readinto(left)
        if not count:
            raise InputError(f"{info.file} ends within {name}; {_AGAIN}")
        left = left[count:]


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file that has been written.

    Attributes:
        file: The file.
        names: The names of its tensors.
        values_of: The number of values of each dtype.
    """

    file: Path
    names: tuple[str, ...]
    values_of: Mapping[np.dtype, int]

    @property
    def bytes(self) -> int:
        """The size of the values."""
        return sum(dtype.itemsize * count for dtype, count in self.values_of.items())


def write_tensors(
    file: Path, tensors: dict[str, np.ndarray], written: Callable[[int], None] = lambda size: None
) -> WeightFile:
    """Writes a safetensors file: the header's length, the header as JSON, the values.

    The function of the `safetensors` library copies all values before it writes them.

    Args:
        file: The file to make.
        tensors: Arrays by name, in C order; each is taken out when it has been written.
        written: Called with the bytes of each tensor.
    """
    # Wide values first, so that all are aligned; there are no gaps in the format.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    # Some versions of transformers refuse a file that does not name a framework.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    values_of: Counter[np.dtype] = Counter()
    end = 0
    for name in names:
        array = tensors[name]
        values_of[array.dtype] += array.size
        header[name] = {
            "dtype": _NAMES_OF_DTYPES[array.dtype],
            "shape": array.shape,
            "data_offsets": (end, end := end + array.nbytes),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    with file.open("wb", buffering=0) as stream:
        _write_all(stream, len(text).to_bytes(8, "little") + text)
        for name in names:
            array = tensors.pop(name)
            _write_all(stream, array.reshape(-1).view(np.uint8))
            written(array.nbytes)
            del array
        # Here, so that the disk works while the next file is made.
        os.fsync(stream.fileno())
    return WeightFile(file, tuple(names), values_of)


def _write_all(stream: RawIOBase, data: bytes | np.ndarray) -> None:
    """Writes all of the data: one call writes 2 GB at most."""
    left = memoryview(data)
    while left:
        left = left[stream.write(left) :]


def _why_unreadable(file: Path, error: SafetensorError) -> str:
    """Describes the damage of a file that safetensors refused: cut off, a pointer, or corrupt."""
    # The format: 8 bytes with the length of the header, the header as JSON, the values.
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            return "is a Git LFS pointer, not the weights; run `git lfs pull` in its repository"
        length = int.from_bytes(start, "little")
        if _LARGEST_HEADER < length <= size:
            return (
                f"says that its header has {length} bytes, more than the {_LARGEST_HEADER} that a "
                f"safetensors file may have: it is damaged, or no safetensors file; {_AGAIN}"
            )
        values_start = 8 + length
        header = stream.read(length) if values_start <= size else b""
    if not header:
        return (
            f"has {size} bytes and ends within its header: it is cut off, or no safetensors "
            f"file; {_AGAIN}"
        )
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name[:2] != "__"]
        expected = values_start + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        expected = size
    if size != expected:
        return f"has {size} bytes where its header describes {expected}; {_AGAIN}"
    return f"is corrupt ({in_one_line(error)}); {_AGAIN}"
