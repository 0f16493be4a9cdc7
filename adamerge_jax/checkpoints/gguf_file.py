"""A GGUF file: its header, and its tensors, restored by the `gguf` package while they are read.

The header is read here: that of a stranger's file may claim any counts and lengths, and each is
held against the size of the file before anything is made of it.

    magic, version, number of tensors, number of fields
    fields:  name, type, value
    tensors: name, number of axes, sizes (the last axis first), type, offset
    padding to the alignment, then the values
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Shaped

from adamerge_jax.checkpoints.composed import PartOfTensor
from adamerge_jax.checkpoints.dtypes import DTYPES, FLOAT32
from adamerge_jax.checkpoints.safetensors_file import (
    TensorInfo,
    open_weights,
    read_entries,
    require_possible,
)
from adamerge_jax.errors import InputError, in_one_line, shorten

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Types of values by their numbers in a file, as `struct` knows them."""

_FLOAT32, _TEXT, _LIST = 6, 8, 9

_LONGEST_LIST = 4096
"""Values of a list, at most, that are kept: one a layer. Vocabularies are counted only."""

_MOST_AXES = 4
_ALIGNMENT = 32  # bytes, where the file names none

_DAMAGED = "it is damaged, or no GGUF file; copy or download it again"

_UNSIGNED = np.dtype(np.uint8)


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file.

    Attributes:
        fields: Its fields by name; of a long list the number of values alone.
        tensors: Its tensors by their names in the file.
    """

    fields: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


@dataclass(frozen=True)
class GgufTensor(TensorInfo):
    """A tensor of a GGUF file.

    Attributes:
        type_number: The number of the type that it is stored in.
        type_name: The name of the type, such as `Q4_K`.
        row_bytes: The bytes of a row.
        heads: The number of attention heads whose rows the file has in the order of pairs, first
            and second halves in turn; 0 for rows in their own order.
        shift: The number that is added to each value.
    """

    type_number: int
    type_name: str
    row_bytes: int
    heads: int = 0
    shift: float = 0.0

    @property
    def merged_dtype(self) -> np.dtype:
        """The dtype of a merge: the file's own, and bfloat16 for quantised values."""
        return DTYPES[{"F32": "float32", "F16": "float16"}.get(self.type_name, "bfloat16")]

    @property
    def stored(self) -> Mapping[str, TensorInfo]:
        """The bytes of the file."""
        shape = (prod(self.shape[:-1]), self.row_bytes)
        return {"": TensorInfo(shape, _UNSIGNED, self.file, self.start)}

    def read(self, name: str, first: int, out: Shaped[np.ndarray, " N"]) -> None:
        """Reads the entries `first : first + N` of the flattened tensor; see `TensorInfo.read`."""
        gguf = import_gguf(self.file)
        columns = self.shape[-1]
        top, bottom = first // columns, -(-(first + len(out)) // columns)
        if self.heads:  # whole heads
            height = self.shape[0] // self.heads
            top, bottom = top // height * height, -(-bottom // height) * height
        rows = np.empty((bottom - top, self.row_bytes), np.uint8)
        with open_weights(self.file) as stream:
            (stored,) = self.stored.values()
            read_entries(stream, name, stored, top * self.row_bytes, rows.reshape(-1))
        with np.errstate(all="ignore"):  # what is not finite is refused by those who ask for it
            values = gguf.dequantize(rows, gguf.GGMLQuantizationType(self.type_number))
        if self.heads:
            values = values.reshape(-1, height // 2, 2, columns).swapaxes(1, 2)
        values = values.reshape(-1)[first - top * columns :][: len(out)]
        np.add(values, np.float32(self.shift), out=out)

    def part(self, first: int, shape: tuple[int, ...]) -> TensorInfo:
        """Returns a part of the tensor; see `TensorInfo.part`."""
        rows, within = divmod(first, self.shape[-1])
        if within or self.heads or shape[-1] != self.shape[-1]:
            return PartOfTensor(shape, self.dtype, self.file, self.start, self, first)
        return dataclasses.replace(self, shape=shape, start=self.start + rows * self.row_bytes)


def import_gguf(file: Path) -> ModuleType:
    """Imports the `gguf` package.

    Args:
        file: The file that needs it, for the message.

    Raises:
        InputError: It is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise InputError(
            f"{file} is a GGUF file, which the package gguf restores; install it with: pip install "
            "'adamerge_jax[gguf]'"
        ) from error
    return gguf


def read_gguf(file: Path) -> GgufFile:
    """Reads the header of a GGUF file.

    Raises:
        InputError: The file is damaged or in several pieces, or has a type that cannot be restored.
    """
    import_gguf(file)
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as m:
            return _Header(file, m).read()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} cannot be read: {in_one_line(error)}") from error


class _Header:
    """Reads a header from front to back."""

    def __init__(self, file: Path, data: mmap.mmap):
        self._file, self._data, self._at = file, data, 4

    def read(self) -> GgufFile:
        if self._data[:4] != _MAGIC:
            raise InputError(f"{self._file} does not begin with {_MAGIC.decode()}; {_DAMAGED}")
        version = self._number("I")
        if version not in _VERSIONS:
            raise InputError(
                f"{self._file} is of GGUF version {version}, expected 2 or 3, in the order of "
                "bytes of this machine; convert the model again"
            )
        tensor_count, field_count = self._count(24, "tensors"), self._count(13, "fields")
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            name = self._text()
            fields[name] = self._value(self._number("I"), name)
        infos = [self._info() for _ in range(tensor_count)]
        alignment = fields.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
            raise InputError(f"{self._file} has general.alignment {shorten(repr(alignment))}")
        start = -(-self._at // alignment) * alignment
        if fields.get("split.count", 0) not in (0, 1):
            raise InputError(
                f"{self._file} is one of {shorten(str(fields['split.count']))} files of a model; "
                "join them with llama-gguf-split --merge"
            )
        tensors: dict[str, GgufTensor] = {}
        for name, shape, type_number, offset in infos:
            if name in tensors:
                raise InputError(f"{self._file} has two tensors called {name}; {_DAMAGED}")
            tensors[name] = self._tensor(name, shape, type_number, start + offset)
        # Or a small file could hold any number of tensors, one upon the other.
        sizes = [prod(tensor.shape[:-1]) * tensor.row_bytes for tensor in tensors.values()]
        if sum(sizes) > len(self._data) - start:
            raise InputError(
                f"{self._file} has tensors of {sum(sizes)} bytes, and {len(self._data) - start} "
                f"bytes behind its header; {_DAMAGED}"
            )
        return GgufFile(fields, tensors)

    def _tensor(
        self, name: str, shape: tuple[int, ...], type_number: int, start: int
    ) -> GgufTensor:
        """Returns a tensor whose type and place are checked."""
        gguf, where = import_gguf(self._file), f"{self._file}: {name}"
        try:
            kind = gguf.GGMLQuantizationType(type_number)
            entries, size = gguf.GGML_QUANT_SIZES[kind]
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise InputError(
                f"{where} is stored in type {type_number}, which the package gguf cannot restore; "
                "convert the model to F16, BF16 or Q8_0"
            ) from error
        if not shape or not prod(shape) or shape[-1] % entries:
            raise InputError(
                f"{where} has shape {shape}, expected rows of a multiple of {entries} values for "
                f"{kind.name}; {_DAMAGED}"
            )
        row_bytes = shape[-1] // entries * size
        end = start + prod(shape[:-1]) * row_bytes
        if end > len(self._data):
            raise InputError(
                f"{where} ends at byte {end}, the file has {len(self._data)}; copy or download it "
                "again"
            )
        return GgufTensor(shape, FLOAT32, self._file, start, type_number, kind.name, row_bytes)

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Reads the name, the shape, the number of the type and the offset of a tensor."""
        name, axes = self._text(), self._number("I")
        if axes > _MOST_AXES:
            raise InputError(f"{self._file} has {shorten(name)} with {axes} axes; {_DAMAGED}")
        shape = tuple(reversed([self._number("Q") for _ in range(axes)]))
        require_possible(self._file, name, list(shape))
        return name, shape, self._number("I"), self._number("Q")

    def _value(self, kind: int, name: str) -> Any:
        """Reads the value of a field; of a long list the number of values."""
        if kind == _TEXT:
            return self._text()
        if kind in _SCALARS:
            value = self._number(_SCALARS[kind])
            # The number that was meant, as its shortest text has it: 1e-6, not 9.99999997e-07.
            return float(str(np.float32(value))) if kind == _FLOAT32 else value
        if kind != _LIST:
            raise InputError(
                f"{self._file} has the field {shorten(name)} of type {kind}; {_DAMAGED}"
            )
        kind = self._number("I")
        if kind == _TEXT:
            count = self._count(8, name)
            for _ in range(count):
                self._skip(self._number("Q"))
            return count
        if kind not in _SCALARS:
            raise InputError(
                f"{self._file} has a list of type {kind} in {shorten(name)}; {_DAMAGED}"
            )
        size = struct.calcsize(_SCALARS[kind])
        count = self._count(size, name)
        if count > _LONGEST_LIST:
            self._skip(count * size)
            return count
        return [self._value(kind, name) for _ in range(count)]

    def _text(self) -> str:
        length = self._number("Q")
        begin = self._at
        self._skip(length)
        return self._data[begin : self._at].decode("utf-8", "replace")

    def _count(self, least: int, things: str) -> int:
        """Reads a number of things of at least so many bytes each."""
        count = self._number("Q")
        if count * least > len(self._data) - self._at:
            raise InputError(
                f"{self._file} says that it has {count} {shorten(things)}, more than its "
                f"{len(self._data)} bytes hold; {_DAMAGED}"
            )
        return count

    def _number(self, code: str) -> Any:
        begin = self._at
        self._skip(struct.calcsize(code))
        return struct.unpack_from(f"<{code}", self._data, begin)[0]

    def _skip(self, size: int) -> None:
        if size > len(self._data) - self._at:
            raise InputError(f"{self._file} ends within its header; {_DAMAGED}")
        self._at += size
