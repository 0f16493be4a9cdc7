"""Task vectors: what each expert changed in the base model, `tau_k = theta_k - theta_base`.

A task vector is frozen. One leaf holds the deltas of all K experts for one parameter, in a
representation of its own. A representation is a pytree node with two methods, `weighted_sum` and
`rows`; nothing else in the package looks inside.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from math import ceil, prod
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
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
        """`sum_k scale[k] * values[k]`, without K scaled copies in memory."""
        shape = self.values.shape
        if any(size not in (1, shape[axis]) for axis, size in enumerate(scale.shape)):
            raise ValueError(f"scale {scale.shape} does not broadcast against deltas {shape}")
        scale = scale.astype(jnp.float32)
        if scale.size == shape[0]:
            # One matrix product; flat, because its gradient is several times as fast on CPU.
            summed = jnp.dot(
                scale.reshape(-1),
                self.values.reshape(shape[0], -1),
                precision=jax.lax.Precision.HIGHEST,
                preferred_element_type=jnp.float32,
            )
            return summed.reshape(shape[1:])
        # As a chain of sums XLA fuses it into one pass over the deltas; as an einsum it is a
        # product for every entry of the scale, half as fast on CPU.
        return functools.reduce(
            jnp.add, (scale[k] * self.values[k].astype(jnp.float32) for k in range(shape[0]))
        )

    def rows(self, index: Int[Array, "..."]) -> "DenseDelta":
        """The deltas of `parameter[index]`, `[K, *index.shape, *shape[1:]]`."""
        return DenseDelta(jnp.take(self.values, index, axis=1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkedDelta:
    """Dense deltas, their entries in pieces that have a coefficient each.

    Attributes:
        values: `[K, pieces, entries of a piece]`, zeros behind the last entry; `[L, K, ...]` for a
            stacked parameter before it is sliced.
        position: `[size]` (`[L, size]`), where each entry of the flattened parameter lies among the
            pieces, or None where they follow each other.
        shape: Of the parameter.
    """

    values: Float[Array, "K pieces entries"]
    position: Int[Array, " size"] | None
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls, delta: DenseDelta, pieces: int, *, stacked: bool, seed: int | None = None
    ) -> "ChunkedDelta":
        """Cuts the flattened parameter into pieces of one length, the last one perhaps shorter.

        Args:
            delta: Dense deltas.
            pieces: Their number.
            stacked: Whether the delta has a leading axis of layers.
            seed: Assigns entries to pieces at random, depending on it and the size alone.
        """
        lead = delta.values.shape[: 1 + stacked]
        shape = delta.values.shape[1 + stacked :]
        size, length = prod(shape), ceil(prod(shape) / pieces)
        values = np.asarray(delta.values).reshape(*lead, size)
        position = None
        if seed is not None:
            order = np.random.default_rng([seed, size]).permutation(size)
            values = values[..., order]
            position = np.empty(size, np.int32)
            position[order] = np.arange(size)
            position = jnp.asarray(np.broadcast_to(position, (*lead[:-1], size)))
        padding = [(0, 0)] * len(lead) + [(0, pieces * length - size)]
        values = np.pad(values, padding).reshape(*lead, pieces, length)
        return cls(jnp.asarray(values), position, shape)

    def weighted_sum(self, scale: Float[Array, "K pieces 1"]) -> Float[Array, "..."]:
        """The sum over experts in the parameter's own shape."""
        flat = DenseDelta(self.values).weighted_sum(scale).reshape(-1)
        if self.position is None:
            return flat[: prod(self.shape)].reshape(self.shape)
        return flat[self.position].reshape(self.shape)

    def rows(self, index: Int[Array, "..."]) -> "Delta":
        """Not there: tables that are read by rows are never cut into pieces."""
        raise NotImplementedError("rows of a parameter in pieces; embedding tables stay whole")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FactoredDelta:
    """Deltas of a matrix as their leading singular directions and the rest.

    Attributes:
        left: `[K, m, r]`, left singular vectors times singular values.
        right: `[K, r, n]`, right singular vectors.
        rest: `[K, m, n]`, what is beyond rank r, or None where that is rounding for all experts.

    A stacked parameter has a leading axis of length L on all of them.
    """

    left: Float[Array, "K m r"]
    right: Float[Array, "K r n"]
    rest: Float[Array, "K m n"] | None

    @classmethod
    def of(cls, delta: DenseDelta, rank: int) -> "FactoredDelta":
        """The singular value decomposition of every delta."""
        values = np.asarray(delta.values, np.float32)
        u, s, v = np.linalg.svd(values, full_matrices=False)
        left, right = u[..., :rank] * s[..., None, :rank], v[..., :rank, :]
        rest = values - left @ right
        negligible = np.linalg.norm(rest) <= _ROUNDING * np.linalg.norm(values)
        return cls(jnp.asarray(left), jnp.asarray(right), None if negligible else jnp.asarray(rest))

    def weighted_sum(self, scale: Float[Array, "K r+1"]) -> Float[Array, "m n"]:
        """The sum over experts and directions; the last coefficient is that of the rest."""
        scale = scale.astype(jnp.float32)
        rank = self.left.shape[-1]
        summed = jnp.einsum(
            "kmr,krn->mn",
            self.left * scale[:, None, :rank],
            self.right,
            precision=jax.lax.Precision.HIGHEST,
        )
        if self.rest is None:
            return summed
        return summed + DenseDelta(self.rest).weighted_sum(scale[:, rank, None, None])

    def rows(self, index: Int[Array, "..."]) -> "Delta":
        """Not there: tables that are read by rows are never factored."""
        raise NotImplementedError("rows of a factored parameter; embedding tables stay whole")


# Of a norm: what the decomposition of a float32 matrix leaves over.
_ROUNDING = 1e-4


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
