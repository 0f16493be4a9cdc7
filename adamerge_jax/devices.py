"""The devices that a run is spread over, and the placement of arrays on them.

They are a mesh `(data, model)`. Every parameter of base and experts is split among the devices of a
`model` group; every device has its own part of each task's examples, with their targets. Compiled
steps of learning communicate as `learning/on_devices.py` and `split.py` say:

- Among all devices, the gradients of the coefficients and of learned heads are summed. A device
  contracts the gradients of its merged weights with the task vectors before, so that none is summed
  for `data` alone.
- In a `model` group, a layer's merged weights are gathered where the layer uses them, each device's
  part mixed by itself, and freed behind it. Their gradients are summed part by part: each device
  keeps the sum for the rows whose task vectors it has.

Coefficients, heads and the state of their optimizers, which are small, are whole on every device.
Where experts are asked and merges evaluated, JAX's compiler inserts the communication.
"""

import ctypes
import dataclasses
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from adamerge_jax.errors import InputError
from adamerge_jax.parameter_names import is_stacked

DATA, MODEL = "data", "model"
"""Names of the axes of the mesh."""

ALL = (DATA, MODEL)
"""Both axes: all devices."""

_WHOLE = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a run.

    Attributes:
        mesh: All devices of all processes, `(data, model)`; None for the first one of this process
            alone, where JAX puts arrays by itself.
    """

    mesh: Mesh | None = None

    @property
    def replicated(self) -> NamedSharding | None:
        """The sharding of arrays that every device has as a whole."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def parameter(self, name: str, array: np.ndarray) -> Array:
        """Returns the host's array of a parameter, split among the devices.

        Matrices are split by their rows, so that summing experts needs no communication and the
        merged matrix is gathered; where the number of rows does not allow it, along the largest
        axis that does. Vectors and arrays without such an axis are whole on every device. The axis
        of stacked layers is never split.

        Args:
            name: The parameter's name.
            array: `[*shape]`, or `[L, *shape]` where the name is stacked.
        """
        return self._put(array, self.parameter_spec(name, array.shape))

    def parameter_spec(self, name: str, shape: tuple[int, ...]) -> PartitionSpec:
        """Returns the split of a parameter, see `parameter`."""
        return self._split(shape, int(is_stacked(name)))

    def delta(self, name: str, delta: PyTree) -> PyTree:
        """Returns the deltas of a parameter, split among the devices as `parameter` does.

        Args:
            name: The parameter's name.
            delta: Any representation, with arrays `[K, ...]` or `[L, K, ...]`.
        """
        return jax.tree.map(self._put, delta, self.delta_specs(name, delta))

    def delta_specs(self, name: str, delta: PyTree) -> PyTree[PartitionSpec]:
        """Returns the split of each array of a parameter's deltas, see `delta`."""

        def spec(path: tuple, array: np.ndarray | Array) -> PartitionSpec:
            # A right factor is split by its columns: its rows are summed over.
            by_columns = getattr(path[-1], "name", None) == "right"
            return self._split(array.shape, 1 + is_stacked(name), by_columns=by_columns)

        return jax.tree_util.tree_map_with_path(spec, delta)

    def replicate(self, tree: PyTree) -> PyTree:
        """Gives every device all arrays of a tree."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return jax.tree.map(lambda array: self._put(array, PartitionSpec()), tree)

    def examples(self, tree: PyTree[np.ndarray], *, axis: int = 0) -> PyTree[np.ndarray | Array]:
        """Gives every device its part of the examples.

        If their number is no multiple of the number of devices, every device is given all of them;
        the computation is split all the same, see `spread`.

        Args:
            tree: Arrays of the host, `[N, ...]`.
            axis: The axis of N, where there are others before it.
        """
        if self.mesh is None:
            return tree

        def put(array: np.ndarray) -> Array:
            divisible = array.shape[axis] % self.mesh.size == 0
            return self._put(array, PartitionSpec(*[None] * axis, ALL) if divisible else _WHOLE)

        return jax.tree.map(put, tree)

    def spread(self, backbone: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a backbone that runs on all devices, each of them on its part of the examples.

        If the number of examples is no multiple of the number of devices, the last example is
        repeated until it is; the outputs are those of the given examples alone.

        Args:
            backbone: A function from parameters and inputs `[N, ...]` by name to `Outputs`.
        """
        if self.mesh is None:
            return backbone
        sharding = NamedSharding(self.mesh, PartitionSpec(ALL))

        def run(parameters: PyTree, inputs: PyTree, *, hidden_states: bool = False) -> Any:
            given = len(jax.tree.leaves(inputs)[0])
            missing = -given % self.mesh.size

            def split(array: Array) -> Array:
                if missing:
                    array = jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1), "edge")
                return jax.lax.with_sharding_constraint(array, sharding)

            outputs = backbone(parameters, jax.tree.map(split, inputs), hidden_states=hidden_states)
            return outputs.examples(slice(given)) if missing else outputs

        return run

    def __str__(self) -> str:
        if self.mesh is None:
            return str(jax.local_devices()[0])
        kind = self.mesh.devices.flat[0].device_kind
        shape = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        hosts = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
        return f"{self.mesh.size} devices ({kind}; {shape}{hosts})"

    def _split(
        self, shape: tuple[int, ...], whole: int, *, by_columns: bool = False
    ) -> PartitionSpec:
        """Returns the split of an array whose leading `whole` axes are not split."""
        sizes = shape[whole:]
        if self.mesh is None or len(sizes) < 2 or self.mesh.shape[MODEL] == 1:
            return PartitionSpec()
        first = len(sizes) - 1 if by_columns else 0
        order = sorted(range(len(sizes)), key=lambda axis: (axis != first, -sizes[axis]))
        for axis in order:
            if sizes[axis] % self.mesh.shape[MODEL] == 0:
                return PartitionSpec(*[None] * (whole + axis), MODEL)
        return PartitionSpec()

    def _put(self, array: np.ndarray | Array, spec: PartitionSpec) -> Array:
        if self.mesh is None:
            return jax.device_put(array, may_alias=True) if isinstance(array, np.ndarray) else array
        sharding = NamedSharding(self.mesh, spec)
        if isinstance(array, jax.Array):
            if len(array.sharding.device_set) == self.mesh.size:
                return jax.device_put(array, sharding)
            array = np.asarray(array)
        # Each process has the whole tensor on its host, and gives its devices their parts alone.
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


ONE_DEVICE = Devices()


def open_devices(
    model: int = 1,
    distributed: bool = False,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Devices:
    """Finds the devices of a run, those of all processes if there are several.

    If there are several processes, it must be called before anything is computed.

    Args:
        model: The number of devices that every parameter is split among.
        distributed: Whether this is one of several processes.
        coordinator: `host:port` of the first process, where JAX does not detect the cluster.
        processes: The number of processes, likewise.
        process: The position of this process among them, from 0, likewise.

    Raises:
        InputError: The number of devices is no multiple of the `model` axis, or the processes
            cannot find each other.
    """
    if distributed and not jax.distributed.is_initialized():
        try:
            jax.distributed.initialize(coordinator, processes, process)
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"devices.distributed: JAX cannot start: {' '.join(str(error).split())}; where it "
                "does not detect the cluster, give devices.coordinator, devices.processes and "
                "devices.process"
            ) from error
    devices = jax.devices()
    if len(devices) % model:
        possible = [str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise InputError(
            f"devices.model: {model} does not divide the {len(devices)} devices; choose "
            f"one of {', '.join(possible)}"
        )
    if len(devices) == 1:
        return ONE_DEVICE
    return Devices(Mesh(np.array(devices).reshape(-1, model), (DATA, MODEL)))


def fetch(array: Array | np.ndarray) -> np.ndarray:
    """Returns a whole array on this host, gathered from all processes; all must call this."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def is_first_process() -> bool:
    """Tells the process that writes and prints from the others."""
    return jax.process_index() == 0


def wait_for_all(where: str) -> None:
    """Waits until all processes have reached the named point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def return_freed_memory() -> None:
    """Gives the system what glibc keeps of freed memory; does nothing with another C library.

    Arrays of many sizes come and go while checkpoints are read and experts are asked, and what is
    free lies between what is in use: with 30 experts of 43 MB that was 75 MB.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
