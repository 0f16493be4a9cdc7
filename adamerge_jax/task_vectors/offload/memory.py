"""The memory that keeps task vectors while coefficients are learned."""

import dataclasses
import itertools
from collections.abc import Iterator
from types import EllipsisType
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from adamerge_jax.devices import ONE_DEVICE, Devices
from adamerge_jax.errors import InputError
from adamerge_jax.parameter_names import is_stacked
from adamerge_jax.task_vectors.delta import LoadedDelta
from adamerge_jax.task_vectors.entries import Entries
from adamerge_jax.task_vectors.offload.scratch import Scratch
from adamerge_jax.task_vectors.offload.streamed import DiskSource, HostSource, Source, StreamedDelta

Place = Literal["device", "host", "disk"]
"""The places for task vectors, from fastest to largest.

- `device`: in the device's memory.
- `host`: in the host's, brought to the device inside the step.
- `disk`: in a temporary file, read inside the step.
"""

# XLA's CPU backend takes over host memory without a copy where it is aligned to this.
_ALIGNMENT_BYTES = 64


class Memory(Protocol):
    """A place for task vectors."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Entries:
        """Returns room for the entries of a delta."""
        ...

    def keep(self, name: str, delta: LoadedDelta) -> LoadedDelta:
        """Returns a parameter's delta in its place; its arrays came from `empty` and are filled."""
        ...


class DeviceMemory:
    """The devices' memory."""

    def __init__(self, devices: Devices = ONE_DEVICE):
        self._devices = devices

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Returns room in the host's memory, which the device takes over."""
        return aligned_empty(shape, dtype)

    def keep(self, name: str, delta: LoadedDelta) -> LoadedDelta:
        """Returns the delta on the devices."""
        return self._devices.delta(name, delta)


class HostMemory:
    """The host's memory."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Returns room in the host's memory."""
        return aligned_empty(shape, dtype)

    def keep(self, name: str, delta: LoadedDelta) -> StreamedDelta:
        """Returns the delta in the host's memory, for the step to bring to the device."""
        return _streamed(HostSource.put(delta), name, delta)


class DiskMemory:
    """A temporary file."""

    def __init__(self) -> None:
        self._scratch = Scratch()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Entries:
        """Returns room in the file, written as it is filled."""
        return self._scratch.empty(shape, dtype)

    def keep(self, name: str, delta: LoadedDelta) -> StreamedDelta:
        """Returns the delta in the file, for the step to read."""
        return _streamed(DiskSource.put(delta, self._scratch), name, delta)


class AbstractMemory:
    """No memory: deltas are shapes and dtypes, `jax.ShapeDtypeStruct`, and nothing is written."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> "AbstractEntries":
        """Returns entries that forget what they are filled with."""
        return AbstractEntries(tuple(shape), np.dtype(dtype))

    def keep(self, name: str, delta: LoadedDelta) -> LoadedDelta:
        """Returns the shapes and dtypes of the delta."""
        return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), delta)


@dataclasses.dataclass(frozen=True)
class AbstractEntries:
    """Entries that are a shape and a dtype alone.

    Attributes:
        shape: Shape of the entries.
        dtype: Dtype of the entries.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator["AbstractEntries"]:
        return itertools.repeat(AbstractEntries(self.shape[1:], self.dtype), len(self))

    def __setitem__(self, where: EllipsisType, values: np.ndarray | int) -> None:
        """Forgets the values."""


def make_memory(place: Place, devices: Devices = ONE_DEVICE) -> Memory:
    """Returns the memory of a recipe.

    Raises:
        InputError: Memory outside the device is asked for with several devices.
    """
    if place == "device":
        return DeviceMemory(devices)
    if devices.mesh is not None:
        raise InputError(
            f"task_vectors.memory: {place} is for one device, and there are {devices}; with "
            "several, let each have a part of the task vectors: device, and devices.model"
        )
    return HostMemory() if place == "host" else DiskMemory()


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialised array that `jax.device_put` need not copy on CPU."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.empty(size + _ALIGNMENT_BYTES, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT_BYTES
    return buffer[start : start + size].view(dtype).reshape(shape)


def _streamed(source: Source, name: str, delta: LoadedDelta) -> StreamedDelta:
    return StreamedDelta(source, _layers(delta) if is_stacked(name) else None)


def _layers(delta: LoadedDelta) -> Array:
    return jnp.arange(jax.tree.leaves(delta)[0].shape[0], dtype=jnp.int32)
