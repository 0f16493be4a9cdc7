"""Where task vectors are kept while coefficients are learned."""

from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from adamerge_jax.task_vectors.delta import LoadedDelta
from adamerge_jax.task_vectors.entries import Entries
from adamerge_jax.task_vectors.scratch import Scratch
from adamerge_jax.task_vectors.streamed import DiskSource, HostSource, Source, StreamedDelta

Place = Literal["device", "host", "disk"]
"""Where task vectors are kept, from fastest to largest.

- `device`: in the device's memory.
- `host`: in the host's, brought to the device inside the step.
- `disk`: in a temporary file, read inside the step.
"""

# XLA's CPU backend takes over host memory without a copy where it is aligned to this.
_ALIGNMENT_BYTES = 64


class Memory(Protocol):
    """A place for task vectors."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Entries:
        """Room for the entries of a delta."""
        ...

    def keep(self, delta: LoadedDelta, *, stacked: bool) -> LoadedDelta:
        """The delta whose arrays came from `empty` and have been filled, ready for use."""
        ...


class DeviceMemory:
    """The device's own memory."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Room in the host's memory, which the device takes over."""
        return aligned_empty(shape, dtype)

    def keep(self, delta: LoadedDelta, *, stacked: bool) -> LoadedDelta:
        """The delta on the device."""
        return jax.device_put(delta, may_alias=True)


class HostMemory:
    """The host's memory."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Room there."""
        return aligned_empty(shape, dtype)

    def keep(self, delta: LoadedDelta, *, stacked: bool) -> StreamedDelta:
        """The delta there, for the step to bring to the device."""
        return _streamed(HostSource.put(delta), delta, stacked)


class DiskMemory:
    """A temporary file."""

    def __init__(self) -> None:
        self._scratch = Scratch()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Entries:
        """Room in the file, written as it is filled."""
        return self._scratch.empty(shape, dtype)

    def keep(self, delta: LoadedDelta, *, stacked: bool) -> StreamedDelta:
        """The delta in the file, for the step to read."""
        return _streamed(DiskSource.put(delta, self._scratch), delta, stacked)


def make_memory(place: Place) -> Memory:
    """The memory of a recipe."""
    return {"device": DeviceMemory, "host": HostMemory, "disk": DiskMemory}[place]()


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that `jax.device_put` need not copy on CPU."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.empty(size + _ALIGNMENT_BYTES, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT_BYTES
    return buffer[start : start + size].view(dtype).reshape(shape)


def _streamed(source: Source, delta: LoadedDelta, stacked: bool) -> StreamedDelta:
    return StreamedDelta(source, _layers(delta) if stacked else None)


def _layers(delta: LoadedDelta) -> Array:
    return jnp.arange(jax.tree.leaves(delta)[0].shape[0], dtype=jnp.int32)
