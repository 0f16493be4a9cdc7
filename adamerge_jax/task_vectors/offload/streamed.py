"""Task vectors outside the device: read inside the step, one expert's piece of one layer at a time.

So the memory that they take on the device does not grow with the number of experts. Low-rank
factors are never kept so: they are small, and their product asks for those of all experts at once.
"""

import dataclasses
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from adamerge_jax.task_vectors.delta import Delta, LoadedDelta
from adamerge_jax.task_vectors.dense import ChunkedDelta
from adamerge_jax.task_vectors.offload.scratch import Scratch, ScratchArray


class Source(Protocol):
    """The place of a delta's arrays. Their first axis is that of experts, or layers before it."""

    def expert(self, layer: Int[Array, ""] | None, k: Int[Array, ""]) -> Delta:
        """Brings one expert's delta to the device, in one layer where there are any, `[1, ...]`."""
        ...

    def loaded(self) -> LoadedDelta:
        """Returns all of it as NumPy arrays."""
        ...

    def another(self, delta: Delta) -> "Source":
        """Puts another delta to the same place."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostSource:
    """Arrays in the host's memory, as JAX's memory kind `pinned_host` has it.

    On the CPU, whose own memory is the host's, they are read where they are.

    Attributes:
        delta: A delta of such arrays.
    """

    delta: Delta

    @classmethod
    def put(cls, delta: Delta) -> "HostSource":
        """Puts the arrays of a delta there."""
        device = jax.local_devices()[0]
        sharding = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        return cls(jax.device_put(delta, sharding, may_alias=True))

    def expert(self, layer: Int[Array, ""] | None, k: Int[Array, ""]) -> Delta:
        """Slices each array once and transfers the piece.

        XLA can do no more to an array in host memory without computing there.
        """
        index = (k,) if layer is None else (layer, k)

        def bring(array: Array) -> Array:
            shape = array.shape[len(index) :]
            start = (*index, *(jnp.zeros_like(k) for _ in shape))
            piece = jax.lax.dynamic_slice(array, start, (*(1 for _ in index), *shape))
            return jax.device_put(piece.reshape(1, *shape), jax.memory.Space.Device)

        return jax.tree.map(bring, self.delta)

    def loaded(self) -> LoadedDelta:
        """Returns all of it as NumPy arrays."""
        return jax.tree.map(np.asarray, self.delta)

    def another(self, delta: Delta) -> "HostSource":
        """Puts another delta there."""
        return HostSource.put(delta)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class DiskSource:
    """Arrays in a scratch file, which a callback reads.

    Attributes:
        delta: A delta of arrays in the file.
        scratch: The file.
    """

    delta: Delta
    scratch: Scratch

    @classmethod
    def put(cls, delta: Delta, scratch: Scratch) -> "DiskSource":
        """Writes the arrays of a delta that are not there yet."""

        def write(array: Array | ScratchArray) -> ScratchArray:
            if isinstance(array, ScratchArray):
                return array
            written = scratch.empty(array.shape, array.dtype)
            written[...] = np.asarray(array)
            return written

        return cls(jax.tree.map(write, delta), scratch)

    def expert(self, layer: Int[Array, ""] | None, k: Int[Array, ""]) -> Delta:
        """Reads one expert's part of each array."""
        index = (k,) if layer is None else (layer, k)
        arrays, structure = jax.tree.flatten(self.delta)

        def read(*index: Int[Array, ""]) -> list[np.ndarray]:
            parts = arrays
            for position in map(int, index):
                parts = [part[position] for part in parts]
            return [np.asarray(part)[None] for part in parts]

        shapes = [
            jax.ShapeDtypeStruct((1, *array.shape[len(index) :]), array.dtype) for array in arrays
        ]
        return jax.tree.unflatten(structure, jax.pure_callback(read, shapes, *index))

    def loaded(self) -> LoadedDelta:
        """Returns all of it as NumPy arrays."""
        return jax.tree.map(np.asarray, self.delta)

    def another(self, delta: Delta) -> "DiskSource":
        """Puts another delta there."""
        return DiskSource.put(delta, self.scratch)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamedDelta:
    """Deltas of any representation that lie outside the device.

    Attributes:
        source: The place. None while a scan over layers slices the rest (`apart_from_layers`).
        layer: `[L]`, the number of each layer for a stacked parameter, a single number once it is
            sliced; None where nothing is stacked.
        index: Index of rows, or None for the whole parameter.
    """

    source: Source | None
    layer: Int[Array, " L"] | Int[Array, ""] | None
    index: Int[Array, "..."] | None = None

    def weighted_sum(self, scale: Float[Array, "K ..."]) -> Float[Array, "..."]:
        """Returns the sum over experts, of whom one at a time is on the device.

        The backward pass brings every expert once more.
        """
        return _weighted_sum(self, scale.astype(jnp.float32))

    def product(self, x: Float[Array, "N n"], scale: Float[Array, "K ..."]) -> None:
        """Returns None: the merged weights are summed first."""
        return None

    def rows(self, index: Int[Array, "..."]) -> "StreamedDelta":
        """Returns deltas whose rows are taken on the device, from one expert at a time."""
        return dataclasses.replace(self, index=index)

    def in_pieces(self, pieces: int, *, stacked: bool, seed: int | None = None) -> Delta:
        """Cuts all experts of this parameter in memory, and puts the pieces where it was."""
        return self.laid_out(lambda delta: delta.in_pieces(pieces, stacked=stacked, seed=seed))

    def by_direction(self, rank: int | None) -> Delta:
        """Decomposes all experts of this parameter in memory, and puts the factors where it was."""
        return self.laid_out(lambda delta: delta.by_direction(rank))

    def laid_out(self, change: Callable[[LoadedDelta], Delta]) -> Delta:
        """Changes the deltas of all experts in memory, and puts them where they were."""
        with _on_host():
            delta = change(self.source.loaded())
        return self._another(delta)

    def norms(self, *, stacked: bool) -> Float[Array, "... K"]:
        """Returns the Frobenius norm of each expert's delta."""
        with _on_host():
            return self.source.loaded().norms(stacked=stacked)

    def expert(self, k: Int[Array, ""]) -> Delta:
        """Returns one expert's delta on the device, `[1, ...]`."""
        delta = self.source.expert(self.layer, k)
        return delta if self.index is None else delta.rows(self.index)

    def _another(self, delta: Delta) -> Delta:
        if isinstance(delta, ChunkedDelta):
            # The places of entries among the pieces are the same for all experts, and stay at hand.
            position = None if delta.position is None else jnp.asarray(np.asarray(delta.position))
            return dataclasses.replace(delta, deltas=self._another(delta.deltas), position=position)
        return dataclasses.replace(self, source=self.source.another(delta))


@jax.custom_vjp
def _weighted_sum(delta: StreamedDelta, scale: Float[Array, "K ..."]) -> Float[Array, "..."]:
    def add(total: Array, expert: tuple[Array, Array]) -> tuple[Array, None]:
        k, scale_of_expert = expert
        return total + delta.expert(k).weighted_sum(scale_of_expert[None]), None

    like = jax.eval_shape(lambda first: delta.expert(jnp.int32(0)).weighted_sum(first), scale[:1])
    experts = (jnp.arange(len(scale), dtype=jnp.int32), scale)
    return jax.lax.scan(add, jnp.zeros(like.shape, like.dtype), experts)[0]


def _forward(
    delta: StreamedDelta, scale: Float[Array, "K ..."]
) -> tuple[Float[Array, "..."], tuple[StreamedDelta, Float[Array, "K ..."]]]:
    return _weighted_sum(delta, scale), (delta, scale)


def _backward(
    residuals: tuple[StreamedDelta, Float[Array, "K ..."]], cotangent: Float[Array, "..."]
) -> tuple[None, Float[Array, "K ..."]]:
    delta, scale = residuals

    def of_expert(_: None, expert: tuple[Array, Array]) -> tuple[None, Array]:
        k, scale_of_expert = expert
        # The sum is linear in the scale, so that the point does not matter.
        _, transposed = jax.vjp(delta.expert(k).weighted_sum, scale_of_expert[None])
        return None, transposed(cotangent)[0][0]

    experts = (jnp.arange(len(scale), dtype=jnp.int32), scale)
    return None, jax.lax.scan(of_expert, None, experts)[1]


_weighted_sum.defvjp(_forward, _backward)


def apart_from_layers(tree: PyTree) -> tuple[PyTree, list[Source | None]]:
    """Takes the sources out of stacked parameters, which a scan over layers must not slice.

    An array in host memory is to be sliced by layer and expert at once, where it is used: a slice
    of a slice would bring all experts of a layer to the device.

    Returns:
        The tree without sources, all of whose arrays have a leading axis of layers; the sources.
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_streamed)
    sources = [leaf.source if _is_streamed(leaf) else None for leaf in leaves]
    leaves = [
        dataclasses.replace(leaf, source=None) if _is_streamed(leaf) else leaf for leaf in leaves
    ]
    return jax.tree.unflatten(structure, leaves), sources


def with_sources(tree: PyTree, sources: list[Source | None]) -> PyTree:
    """Puts the sources that `apart_from_layers` took out back into one layer."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_streamed)
    pairs = zip(leaves, sources, strict=True)
    return jax.tree.unflatten(
        structure,
        [
            leaf if source is None else dataclasses.replace(leaf, source=source)
            for leaf, source in pairs
        ],
    )


def of_layer(delta: Delta, layer: int) -> Delta:
    """Returns the delta of one layer of a stacked parameter, outside of compiled functions."""
    stacked, sources = apart_from_layers(delta)
    return with_sources(jax.tree.map(operator.itemgetter(layer), stacked), sources)


def _on_host() -> AbstractContextManager[None]:
    """Returns a context in which arrays are computed in the host's memory."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def _is_streamed(leaf: object) -> bool:
    return isinstance(leaf, StreamedDelta)
