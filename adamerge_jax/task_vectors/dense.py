"""Task vectors entry by entry."""

import dataclasses
import functools
from math import ceil, prod

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from adamerge_jax.devices import fetch
from adamerge_jax.task_vectors.delta import Delta
from adamerge_jax.task_vectors.factored import FactoredDelta


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseDelta:
    """Deltas stored entry by entry.

    Attributes:
        values: `[K, *shape]`, or `[L, K, *shape]` for a stacked parameter before it is sliced.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax import DenseDelta
        >>> delta = DenseDelta(jnp.array([[[1.0, 1.0]], [[0.0, 2.0]]]))  # [K, *shape] = [2, 1, 2]
        >>> delta.weighted_sum(jnp.array([0.5, 0.25]).reshape(2, 1, 1)).tolist()
        [[0.5, 1.0]]
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

    def product(self, x: Float[Array, "N n"], scale: Float[Array, "K ..."]) -> None:
        """None: one product with the merged weights is less than one for each expert."""
        return None

    def rows(self, index: Int[Array, "..."]) -> "DenseDelta":
        """The deltas of `parameter[index]`, `[K, *index.shape, *shape[1:]]`."""
        return DenseDelta(jnp.take(self.values, index, axis=1))

    def in_pieces(self, pieces: int, *, stacked: bool, seed: int | None = None) -> "ChunkedDelta":
        """A copy with the entries of a piece side by side."""
        lead = self.values.shape[: 1 + stacked]
        shape = self.values.shape[1 + stacked :]
        size, length = prod(shape), ceil(prod(shape) / pieces)
        values = fetch(self.values).reshape(*lead, size)
        position = None
        if seed is not None:
            order = random_order(size, seed)
            values = values[..., order]
            position = positions_in(order, lead[:-1])
        padding = [(0, 0)] * len(lead) + [(0, pieces * length - size)]
        values = np.pad(values, padding).reshape(*lead, pieces, length)
        return ChunkedDelta(DenseDelta(jnp.asarray(values)), position, shape)

    def by_direction(self, rank: int) -> FactoredDelta:
        """The singular value decomposition of every delta."""
        values = fetch(self.values).astype(np.float32)
        u, s, v = np.linalg.svd(values, full_matrices=False)
        left, right = u[..., :rank] * s[..., None, :rank], v[..., :rank, :]
        rest = values - left @ right
        negligible = np.linalg.norm(rest) <= _ROUNDING * np.linalg.norm(values)
        rest = None if negligible else DenseDelta(jnp.asarray(rest))
        return FactoredDelta(jnp.asarray(left), jnp.asarray(right), rest)

    def norms(self, *, stacked: bool) -> Float[Array, "... K"]:
        """Frobenius norm of each expert's delta."""
        flat = self.values.reshape(*self.values.shape[: 1 + stacked], -1)
        return jnp.linalg.norm(flat.astype(jnp.float32), axis=-1)


# Of a norm: what the decomposition of a float32 matrix leaves over.
_ROUNDING = 1e-4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkedDelta:
    """Dense deltas, their entries in pieces that have a coefficient each.

    Attributes:
        deltas: Of shape `[K, pieces, entries of a piece]`, zeros behind the last entry;
            `[L, K, ...]` for a stacked parameter before it is sliced.
        position: `[size]` (`[L, size]`), where each entry of the flattened parameter lies among the
            pieces, or None where they follow each other.
        shape: Of the parameter.
    """

    deltas: Delta
    position: Int[Array, " size"] | None
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def weighted_sum(self, scale: Float[Array, "K pieces 1"]) -> Float[Array, "..."]:
        """The sum over experts in the parameter's own shape."""
        flat = self.deltas.weighted_sum(scale).reshape(-1)
        if self.position is None:
            return flat[: prod(self.shape)].reshape(self.shape)
        return flat[self.position].reshape(self.shape)

    def product(self, x: Float[Array, "N n"], scale: Float[Array, "K ..."]) -> None:
        """None: the merged weights are summed first."""
        return None

    def rows(self, index: Int[Array, "..."]) -> None:
        """None: a piece is no row, so that the merged weights are summed first."""
        return None


def random_order(size: int, seed: int) -> Int[np.ndarray, " size"]:
    """The entries of a flattened parameter in the order in which pieces take them."""
    return np.random.default_rng([seed, size]).permutation(size).astype(np.int32)


def positions_in(
    order: Int[np.ndarray, " size"], layers: tuple[int, ...]
) -> Int[Array, "... size"]:
    """Where each entry stands in an order, the same for each of the layers."""
    return jnp.asarray(np.broadcast_to(np.argsort(order), (*layers, len(order))))
