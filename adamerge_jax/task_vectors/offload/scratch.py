"""A file for task vectors that do not fit into memory."""

import dataclasses
import errno
import os
import tempfile
from collections.abc import Iterator
from math import prod
from types import EllipsisType

import numpy as np

from adamerge_jax.errors import InputError


class Scratch:
    """A temporary file that arrays are written to and read from, piece by piece.

    It has no name, so that the system removes it when the process ends, however that happens. It
    lies where Python puts temporary files: `TMPDIR` decides. Nothing is mapped into memory, so that
    no piece stays in the process once it has been used.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._size = 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> "ScratchArray":
        """Returns room for an array; entries that are not written are 0."""
        array = ScratchArray(self, self._size, tuple(shape), np.dtype(dtype))
        self._size += array.nbytes
        os.ftruncate(self._file.fileno(), self._size)
        return array

    def write(self, offset: int, data: memoryview) -> None:
        """Writes bytes.

        Raises:
            InputError: The disk is full.
        """
        try:
            while data:
                written = os.pwrite(self._file.fileno(), data, offset)
                offset, data = offset + written, data[written:]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise InputError(
                f"task_vectors.memory: {tempfile.gettempdir()} has no room for the task vectors "
                f"({error.strerror}); set TMPDIR to a folder on a larger disk"
            ) from error

    def read(self, offset: int, data: memoryview) -> None:
        """Fills `data`."""
        while data:
            count = os.preadv(self._file.fileno(), [data], offset)
            if not count:
                raise EOFError("the scratch file of the task vectors has been cut short")
            offset, data = offset + count, data[count:]


@dataclasses.dataclass(frozen=True, eq=False)
class ScratchArray:
    """An array in a scratch file; `np.asarray` reads it.

    Attributes:
        scratch: The file.
        offset: Position of its first byte.
        shape: Its shape.
        dtype: Its dtype.
    """

    scratch: Scratch
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> "ScratchArray":
        """Returns the part at an index of the first axis."""
        part = ScratchArray(self.scratch, self.offset, self.shape[1:], self.dtype)
        return dataclasses.replace(part, offset=self.offset + index * part.nbytes)

    def __iter__(self) -> Iterator["ScratchArray"]:
        return (self[index] for index in range(len(self)))

    def __setitem__(self, where: EllipsisType, values: np.ndarray | int) -> None:
        whole = np.broadcast_to(np.asarray(values).astype(self.dtype, copy=False), self.shape)
        self.scratch.write(self.offset, _bytes(np.ascontiguousarray(whole)))

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        array = np.empty(self.shape, self.dtype)
        self.scratch.read(self.offset, _bytes(array))
        return array if dtype is None else array.astype(dtype, copy=False)


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))
