"""Task vectors: what each expert changed in the base model, `tau_k = theta_k - theta_base`.

A task vector is frozen. One leaf holds the deltas of all K experts for one parameter, in a
representation of its own. A representation is a pytree node with two methods, `weighted_sum` and
`rows`; nothing else in the package looks inside.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from string import ascii_lowercase
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from adamerge_jax.errors import InputError
from adamerge_jax.names import is_stacked, leaf_name


class Delta(Protocol):
    """The deltas of K experts for one parameter, in any representation."""

    def weighted_sum(self, scale: Float[Array, "K ..."]) -> Float[Array, "..."]:
        """`sum_k scale[k] * tau_k` in float32; `scale` broadcasts against `[K, *shape]`."""
        ...

    def rows(self, index: Int[Array, "..."]) -> "Delta":
        """The same deltas for the rows `parameter[index]` alone."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseDelta:
    """Deltas stored entry by entry.

    Attributes:
        values: `[K, *shape]`, or `[L, K, *shape]` for a stacked parameter before it is sliced.
    """

    values: Float[Array, "K ..."]

    def weighted_sum(self, scale: Float[Array, "K ..."]) -> Float[Array, "..."]:
        """`sum_k scale[k] * values[k]` as one contraction over the experts.

        A contraction rather than a product and a sum: it never holds K scaled copies, and its
        gradient with respect to `scale` is a contraction too.
        """
        shape = self.values.shape
        varying = [
            axis for axis, size in enumerate(scale.shape) if axis == 0 or size == shape[axis] != 1
        ]
        if any(scale.shape[axis] != 1 for axis in range(scale.ndim) if axis not in varying):
            raise ValueError(f"scale {scale.shape} does not broadcast against deltas {shape}")
        # The axes behind the last varying one are one to the contraction, and as one axis they
        # make its gradient several times as fast on CPU.
        kept = varying[-1] + 1
        axes = ascii_lowercase[: kept + 1]
        summed = jnp.einsum(
            f"{''.join(axes[axis] for axis in varying)},{axes}->{axes[1:]}",
            scale.reshape([scale.shape[axis] for axis in varying]).astype(jnp.float32),
            self.values.reshape(*shape[:kept], -1),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return summed.reshape(shape[1:])

    def rows(self, index: Int[Array, "..."]) -> "DenseDelta":
        """The deltas of `parameter[index]`, `[K, *index.shape, *shape[1:]]`."""
        return DenseDelta(jnp.take(self.values, index, axis=1))


def task_vectors(base: PyTree[Array], experts: Sequence[PyTree[Array]]) -> dict[str, DenseDelta]:
    """Subtracts the base model from each of its experts.

    Args:
        base: Parameters of the base model, any pytree.
        experts: K pytrees of the same structure and shapes.

    Returns:
        One delta per parameter name, `[K, *shape]`, or `[L, K, *shape]` where the name is stacked.
        Parameters that no expert changed have no entry: nothing is to be mixed there.

    Raises:
        InputError: An expert's structure or a shape differs from the base's.
    """
    deltas = {}
    base_leaves = _named_leaves(base)
    expert_leaves = [_named_leaves(expert) for expert in experts]
    for position, leaves in enumerate(expert_leaves):
        if difference := sorted(base_leaves.keys() ^ leaves.keys()):
            where = "base" if difference[0] in base_leaves else f"expert {position}"
            raise InputError(
                f"expert {position}: parameter {difference[0]!r} is only in the {where}; "
                "experts must have the base's parameters"
            )
    for name, base_leaf in base_leaves.items():
        for position, leaves in enumerate(expert_leaves):
            if leaves[name].shape != base_leaf.shape:
                raise InputError(
                    f"expert {position}: parameter {name!r} has shape {leaves[name].shape}, "
                    f"the base has {base_leaf.shape}"
                )
        start = jnp.asarray(base_leaf, jnp.float32)
        differences = [jnp.asarray(leaves[name], jnp.float32) - start for leaves in expert_leaves]
        values = jnp.stack(differences, axis=1 if is_stacked(name) else 0)
        if values.any():
            deltas[name] = DenseDelta(values.astype(base_leaf.dtype))
    return deltas


def _named_leaves(tree: PyTree[Array]) -> Mapping[str, Array]:
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
