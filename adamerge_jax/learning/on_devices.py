"""A step on several devices: each runs its part of every task's examples, then sums are shared.

All communication of a step is written here and in `split.py`; the compiler adds none. Without
`devices.model` that is the sum of coefficients' gradients: each device contracts the gradients of
its merged weights with the task vectors itself. With it weights are gathered, and their gradients
summed part by part, layer after layer.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PyTree

from adamerge_jax.data.batches import Batch
from adamerge_jax.devices import ALL, MODEL, Devices
from adamerge_jax.mixing import Mixture, is_mixture
from adamerge_jax.objectives import Objective, Targets, TaskOutputs
from adamerge_jax.parameter_names import leaf_name
from adamerge_jax.split import WHOLE, SplitParameter
from adamerge_jax.stacks import Stacked


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of a step that one device computes.

    Attributes:
        axes: The split axis of each array of a parameter and its deltas, by the name of the
            parameter; those that every device has as a whole are left out.
        examples: B, the examples of a task in the whole batch; None for one device.
    """

    axes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    examples: int | None = None

    def parameters(self, mixed: PyTree[Array | Mixture]) -> PyTree:
        """Returns parameters that are gathered where they are used.

        Args:
            mixed: The result of `mix`, of this device's parts.
        """

        def leaf(path: tuple, parameter: Array | Mixture) -> Any:
            axes = self.axes.get(leaf_name(path))
            if axes is None:
                return parameter
            whole = len(jax.tree.leaves(parameter)) - len(axes)
            return SplitParameter(parameter, (*axes, *[WHOLE] * whole))  # the scale is whole

        return jax.tree_util.tree_map_with_path(leaf, mixed, is_leaf=is_mixture)

    def objectives(self, objectives: Sequence[Objective]) -> list[Objective]:
        """Returns objectives that see the examples of all devices, where they must see a batch."""
        if self.examples is None:
            return list(objectives)
        of_batch = {id(one): self._of_whole_batch(one) for one in objectives}
        return [of_batch[id(one)] for one in objectives]

    def parts(self, microbatches: int, batch: Batch) -> int:
        """Returns the number of parts of this device's examples, at most that of microbatches."""
        if self.examples is None:
            return microbatches
        size = batch.weights.shape[1]
        return next(n for n in range(min(microbatches, size), 0, -1) if size % n == 0)

    def _of_whole_batch(self, objective: Objective) -> Objective:
        spec = objective.target_spec
        if not (spec.whole_batch or spec.cross_task):
            return objective

        def value(outputs: TaskOutputs, targets: Targets) -> Float[Array, " B"]:
            size = outputs.logits.shape[0]
            if not spec.whole_batch and self.examples % size == 0:
                return objective.value(outputs, targets)  # a mean over examples is that of means

            def of_all(array: Array) -> Array:
                gathered = jax.lax.all_gather(array, ALL, axis=0, tiled=True)
                return gathered[: self.examples]  # without those that fill up the last part

            values = objective.value(*jax.tree.map(of_all, (outputs, targets)))
            copies = size * jax.lax.axis_size(ALL) - self.examples
            return _part_of(jnp.pad(values, (0, copies)), size)

        return objective._replace(value=value)


Compute = Callable[[PyTree, Any, Batch, Share], tuple[PyTree, PyTree]]
"""`(learned, frozen, batch, share) -> (sums over examples, entries for each, [G, B, ...])`."""


def on_devices(compute: Compute, devices: Devices) -> Callable[..., tuple[PyTree, PyTree]]:
    """Returns a function that computes on all devices.

    Args:
        compute: The computation of one device: from what is learned, the parts of base and deltas
            that the device has, and its examples.
        devices: The devices.

    Returns:
        `(learned, frozen, batch) -> (sums over all examples, entries of all examples)`, of a batch
        as `Batch.spread` lays it out. Entries are `[G, B, ...]` for groups of tasks, those of
        copies that fill up the last part among them.
    """
    whole, by_example, by_group = PartitionSpec(), PartitionSpec(ALL), PartitionSpec(None, ALL)

    def run(learned: PyTree, frozen: Any, batch: Batch) -> tuple[PyTree, PyTree]:
        batch = batch._replace(targets=Stacked.of(batch.targets))
        if devices.mesh is None:
            return compute(learned, frozen, batch, Share())
        specs = frozen._replace(
            base=jax.tree_util.tree_map_with_path(
                lambda path, array: devices.parameter_spec(leaf_name(path), array.shape),
                frozen.base,
            ),
            deltas={name: devices.delta_specs(name, d) for name, d in frozen.deltas.items()},
            heads=whole,
        )
        share = Share(_split_axes(frozen, specs), batch.weights.shape[1])

        def of_device(learned: PyTree, frozen: Any, part: Batch) -> tuple[PyTree, PyTree]:
            size = jax.tree.leaves(part.inputs)[0].shape[0] // len(part.targets)
            missing = size * devices.mesh.size - part.weights.shape[1]
            weights = jnp.pad(part.weights, [(0, 0), (0, missing)])  # copies count for nothing
            weights = _part_of(weights.T, size).T
            sums, entries = compute(learned, frozen, part._replace(weights=weights), share)
            return jax.lax.psum(sums, ALL), entries

        return jax.shard_map(
            of_device,
            mesh=devices.mesh,
            in_specs=(whole, specs, Batch(by_example, whole, by_group, by_example)),
            out_specs=(whole, by_group),
            # Sums are written out above: where something is whole is known without an inference.
            check_vma=False,
        )(learned, frozen, batch)

    return run


def _part_of(array: Array, size: int) -> Array:
    """Returns this device's entries of an array of those of all, `[size, ...]`."""
    return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(ALL) * size, size)


def _split_axes(frozen: Any, specs: Any) -> dict[str, tuple[int, ...]]:
    """Returns `Share.axes`, from the splits of base and deltas."""
    axes = {}

    def leaf(path: tuple, array: Array, spec: PartitionSpec) -> None:
        name = leaf_name(path)
        arrays, splits = [array], [spec]
        if name in frozen.deltas:
            arrays += jax.tree.leaves(frozen.deltas[name])
            splits += jax.tree.leaves(specs.deltas[name])
        of_arrays = tuple(map(_split_axis, arrays, splits))
        if any(axis != WHOLE for axis in of_arrays):
            axes[name] = of_arrays

    jax.tree_util.tree_map_with_path(leaf, frozen.base, specs.base)
    return axes


def _split_axis(array: Array, spec: PartitionSpec) -> int:
    return spec.index(MODEL) - array.ndim if MODEL in spec else WHOLE
