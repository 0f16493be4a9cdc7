"""Where task vectors are kept while coefficients are learned."""

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

    def keep(self, name: str, delta: LoadedDelta) -> LoadedDelta:
        """A parameter's delta whose arrays came from `empty` and have been filled."""
        ...


class DeviceMemory:
    """The own memory of the devices."""

    def __init__(self, devices: Devices = ONE_DEVICE):
        self._devices = devices

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Room in the host's memory, which the device takes over."""
        return aligned_empty(shape, dtype)

    def keep(self, name: str, delta: LoadedDelta) -> LoadedDelta:
        """The delta on the devices."""
        return self._devices.delta(name, delta)


class HostMemory:
    """The host's memory."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Room there."""
        return aligned_empty(shape, dtype)

    def keep(self, name: str, delta: LoadedDelta) -> StreamedDelta:
        """The delta there, for the step to bring to the device."""
        return _streamed(HostSource.put(delta), name, delta)


class DiskMemory:
    """A temporary file."""

    def __init__(self) -> None:
        self._scratch = Scratch()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Entries:
        """Room in the file, written as it is filled."""
        return self._scratch.empty(shape, dtype)

    def keep(self, name: str, delta: LoadedDelta) -> StreamedDelta:
        """The delta in the file, for the step to read."""
        return _streamed(DiskSource.put(delta, self._scratch), name, delta)


def make_memory(place: Place, devices: Devices = ONE_DEVICE) -> Memory:
    """The memory of a recipe.

    Raises:
        InputError: What is outside the device is asked for with several devices.
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
    """An uninitialised array that `jax.device_put` need not copy on CPU."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.empty(size + _ALIGNMENT_BYTES, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT_BYTES
    return buffer[start : start + size].view(dtype).reshape(shape)


def _streamed(source: Source, name: str, delta: LoadedDelta) -> StreamedDelta:
    return StreamedDelta(source, _layers(delta) if is_stacked(name) else None)


def _layers(delta: LoadedDelta) -> Array:
    return jnp.arange(jax.tree.leaves(delta)[0].shape[0], dtype=jnp.int32)
