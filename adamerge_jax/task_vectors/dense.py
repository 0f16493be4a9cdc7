"""Task vectors entry by entry."""

import dataclasses
from math import ceil, prod
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from adamerge_jax.task_vectors.delta import Delta
from adamerge_jax.task_vectors.expert_sums import gradients_of_scales, sum_over_experts
from adamerge_jax.task_vectors.factored import FactoredDelta
from adamerge_jax.task_vectors.layout import is_abstract, lay_out, positions_in, random_order


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
        """Returns `sum_k scale[k] * values[k]`, without K scaled copies in memory."""
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
        return _weighted_sum(self.values, scale)

    def product(self, x: Float[Array, "N n"], scale: Float[Array, "K ..."]) -> None:
        """Returns None: one product with the merged weights is less than one for each expert."""
        return None

    def rows(self, index: Int[Array, "..."]) -> "DenseDelta":
        """Returns the deltas of `parameter[index]`, `[K, *index.shape, *shape[1:]]`."""
        return DenseDelta(jnp.take(self.values, index, axis=1))

    def in_pieces(self, pieces: int, *, stacked: bool, seed: int | None = None) -> "ChunkedDelta":
        """Returns a copy with the entries of a piece side by side."""
        leading, shape = self.values.shape[: 1 + stacked], self.values.shape[1 + stacked :]
        size, length = prod(shape), ceil(prod(shape) / pieces)

        def cut(
            numpy: ModuleType, values: Float[Array, "K ..."], order: Int[Array, " size"] | None
        ) -> tuple[Float[Array, "K pieces length"], Int[Array, " size"] | None]:
            values = values.reshape(*leading, size)
            if order is not None:
                values = values[..., order]
            padding = [(0, 0)] * len(leading) + [(0, pieces * length - size)]
            values = numpy.pad(values, padding).reshape(*leading, pieces, length)
            return values, positions_in(numpy, order, leading[:-1])

        order = random_order(size, seed, abstract=is_abstract(self))
        values, position = lay_out(cut, self.values, order)
        return ChunkedDelta(DenseDelta(values), position, shape)

    def by_direction(self, rank: int | None) -> FactoredDelta:
        """Returns the singular value decomposition of every delta."""

        def decompose(numpy: ModuleType, values: Float[Array, "K m n"]) -> FactoredDelta:
            values = values.astype(np.float32)
            u, s, v = numpy.linalg.svd(values, full_matrices=False)
            left, right = u[..., :rank] * s[..., None, :rank], v[..., :rank, :]
            if rank is None:
                return FactoredDelta(left, right, None)
            rest = values - left @ right
            # From shapes alone nothing is known to be negligible.
            if numpy is np and np.linalg.norm(rest) <= _ROUNDING * np.linalg.norm(values):
                return FactoredDelta(left, right, None)
            return FactoredDelta(left, right, DenseDelta(rest))

        return lay_out(decompose, self.values)

    def norms(self, *, stacked: bool) -> Float[Array, "... K"]:
        """Returns the Frobenius norm of each expert's delta."""
        flat = self.values.reshape(*self.values.shape[: 1 + stacked], -1)
        return jnp.linalg.norm(flat.astype(jnp.float32), axis=-1)


def _of_expert(values: Float[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    return scale * values.astype(jnp.float32)


@jax.custom_vjp
def _weighted_sum(
    values: Float[Array, "K ..."], scale: Float[Array, "K ..."]
) -> Float[Array, "..."]:
    return sum_over_experts(_of_expert, values, scale)


def _forward(
    values: Float[Array, "K ..."], scale: Float[Array, "K ..."]
) -> tuple[Float[Array, "..."], tuple[Float[Array, "K ..."], Float[Array, "K ..."]]]:
    return _weighted_sum(values, scale), (values, scale)


def _backward(
    residuals: tuple[Float[Array, "K ..."], Float[Array, "K ..."]], cotangent: Float[Array, "..."]
) -> tuple[Float[Array, "K ..."], Float[Array, "K ..."]]:
    values, scale = residuals
    # A processor keeps the products whose sums these are, an accelerator does not. A loop over two
    # takes longer to compile than both side by side.
    in_turn = jax.default_backend() == "cpu" and len(values) > 2
    of_scales = gradients_of_scales(_of_expert, values, scale, cotangent=cotangent, in_turn=in_turn)
    return (scale * cotangent).astype(values.dtype), of_scales


_weighted_sum.defvjp(_forward, _backward)


_ROUNDING = 1e-4
"""Part of a norm that the decomposition of a float32 matrix leaves over."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkedDelta:
    """Dense deltas, their entries in pieces that have a coefficient each.

    Attributes:
        deltas: Deltas of shape `[K, pieces, entries of a piece]`, zeros behind the last entry;
            `[L, K, ...]` for a stacked parameter before it is sliced.
        position: `[size]` (`[L, size]`), the place of each entry of the flattened parameter among
            the pieces, or None where they follow each other.
        shape: Shape of the parameter.
    """

    deltas: Delta
    position: Int[Array, " size"] | None
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def weighted_sum(self, scale: Float[Array, "K pieces 1"]) -> Float[Array, "..."]:
        """Returns the sum over experts in the parameter's own shape."""
        flat = self.deltas.weighted_sum(scale).reshape(-1)
        if self.position is None:
            return flat[: prod(self.shape)].reshape(self.shape)
        return flat[self.position].reshape(self.shape)

    def product(self, x: Float[Array, "N n"], scale: Float[Array, "K ..."]) -> None:
        """Returns None: the merged weights are summed first."""
        return None

    def rows(self, index: Int[Array, "..."]) -> None:
        """Returns None: a piece is no row, so that the merged weights are summed first."""
        return None
