"""Parameters of which a device has a part, as lazy leaves: gathered where a layer uses them.

Inside a `jax.shard_map` over the mesh of a run, each device mixes its own part of a parameter and
gathers the others' parts of the merged one, so that what is gathered does not grow with the number
of experts. The gradient of the merged parameter is summed over devices part by part (a
reduce-scatter), and each device contracts its part with its own task vectors.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PyTree

from adamerge_jax.devices import MODEL
from adamerge_jax.mixing import MERGED_WEIGHT, Lazy, Mixture, for_all
from adamerge_jax.task_vectors import Delta, DenseDelta, QuantizedDelta

WHOLE = 0
"""The split axis of an array that every device has as a whole. Others count from the last, -1."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplitParameter(Lazy):
    """A parameter, merged or not, of which this device has a part.

    Attributes:
        part: An array, or a `Mixture` of arrays: this device's part of each.
        axes: The split axis of each array of `part`, in the order of its leaves, or `WHOLE`.
    """

    part: Array | Mixture
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def materialize(self) -> Float[Array, "..."]:
        """Returns the whole parameter: mixed in parts where its deltas are entries, then gathered.

        Otherwise small factors of its deltas are gathered and mixed.
        """
        if not self._mixes_in_parts:
            return self._whole().materialize()
        axis = self._axes_of_part.base
        scale = _part_of_scale(self.part.scale, self.part.base.shape[axis], axis)
        merged = dataclasses.replace(self.part, scale=scale).materialize()
        return checkpoint_name(_gathered(merged, axis), MERGED_WEIGHT)

    def apply(self, x: Float[Array, "N n"]) -> Float[Array, "N m"]:
        """Returns `x @ materialize().T`, without the merged matrix where that is less work."""
        return x @ self.materialize().T if self._mixes_in_parts else self._whole().apply(x)

    def rows(self, index: Int[Array, "..."]) -> Float[Array, "..."]:
        """Returns `materialize()[index]`; each device asks for rows of its own."""
        return self.materialize()[index] if self._mixes_in_parts else self._whole().rows(index)

    def for_all(self) -> "Array | Lazy":
        """Returns the whole parameter, gathered once."""
        return self.materialize() if self._mixes_in_parts else for_all(self._whole())

    @property
    def _axes_of_part(self) -> PyTree[int]:
        return jax.tree.unflatten(jax.tree.structure(self.part), self.axes)

    @property
    def _mixes_in_parts(self) -> bool:
        """True where base and deltas are entry by entry, and split along the same axis."""
        if not isinstance(self.part, Mixture):
            return False
        axes = self._axes_of_part
        return axes.base != WHOLE and _split_axis(self.part.delta, axes.delta) == axes.base

    def _whole(self) -> Lazy:
        """Returns the parameter with the arrays of all devices."""

        def whole(node: Array | Delta, axes: PyTree[int]) -> Array | Delta:
            if not _is_entry_by_entry(node):
                return _gathered(node, axes)
            axis = _split_axis(node, axes)
            if axis is None:
                return jax.tree.map(_gathered, node, axes)
            return node if axis == WHOLE else SumOfParts(node, axis)

        gathered = jax.tree.map(whole, self.part, self._axes_of_part, is_leaf=_is_entry_by_entry)
        return gathered if isinstance(gathered, Mixture) else _Gathered(gathered)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SumOfParts:
    """Deltas of which this device has a part; their sum over experts is gathered.

    Attributes:
        delta: This device's part of the deltas.
        axis: The axis along which they are split, counted from the last, -1.
    """

    delta: DenseDelta | QuantizedDelta
    axis: int = dataclasses.field(metadata={"static": True})

    def weighted_sum(self, scale: Float[Array, "K ..."]) -> Float[Array, "..."]:
        """Returns the whole sum over experts."""
        scale = _part_of_scale(scale, self.delta.values.shape[self.axis], self.axis)
        return _gathered(self.delta.weighted_sum(scale), self.axis)

    def product(self, x: Float[Array, "N n"], scale: Float[Array, "K ..."]) -> None:
        """Returns None: the merged weights are summed first."""
        return None

    def rows(self, index: Int[Array, "..."]) -> None:
        """Returns None: each device asks for rows of its own."""
        return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Gathered(Lazy):
    """A parameter that has been gathered."""

    array: Float[Array, "..."]

    def materialize(self) -> Float[Array, "..."]:
        return self.array

    def apply(self, x: Float[Array, "N n"]) -> Float[Array, "N m"]:
        return x @ self.array.T

    def rows(self, index: Int[Array, "..."]) -> Float[Array, "..."]:
        return self.array[index]


def _is_entry_by_entry(node: object) -> bool:
    return isinstance(node, DenseDelta | QuantizedDelta)


def _split_axis(delta: Delta, axes: PyTree[int]) -> int | None:
    """Returns the axis along which all arrays of a delta are split; None where there is no one."""
    if not _is_entry_by_entry(delta):
        return None
    axis = axes.values
    if isinstance(delta, QuantizedDelta) and axis != WHOLE and axes.steps != axis:
        # Steps of one entry along that axis are those of all parts.
        steps = delta.steps
        return axis if axes.steps == WHOLE and steps.shape[axis] == 1 else None
    return axis


def _part_of_scale(scale: Float[Array, "K ..."], size: int, axis: int) -> Float[Array, "K ..."]:
    """Returns the scale of this device's part, which has so many entries along an axis."""
    if scale.shape[axis] == 1:
        return scale
    start = jax.lax.axis_index(MODEL) * size
    return jax.lax.dynamic_slice_in_dim(scale, start, size, scale.ndim + axis)


def _gathered(array: Array, axis: int) -> Array:
    """Returns the parts of all devices side by side."""
    if axis == WHOLE:
        return array
    with jax.named_scope("gather"):
        if array.dtype == jnp.int4:  # which no collective knows
            return _gathered(array.astype(jnp.int8), axis).astype(jnp.int4)
        return jax.lax.all_gather(array, MODEL, axis=array.ndim + axis, tiled=True)
