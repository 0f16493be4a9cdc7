"""Task vectors as low-rank factors, which are never multiplied out as a whole: LoRA."""

import dataclasses
from math import ceil, prod
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from adamerge_jax.task_vectors.factored import FactoredDelta
from adamerge_jax.task_vectors.layout import is_abstract, lay_out, positions_in, random_order


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankDelta:
    """Deltas of a matrix as `tau_k = left_k right_k` (Hu et al., ICLR 2022: B A, scaled).

    Attributes:
        left: `[K, m, r]`; experts of lower rank than r have columns of zeros.
        right: `[K, r, n]`.

    A stacked parameter has a leading axis of length L on both.

    Examples:
        Two experts of rank 1 for a matrix `[2, 3]`, each a LoRA adapter's B and A:

        >>> import jax.numpy as jnp
        >>> from adamerge_jax import LowRankDelta
        >>> left = jnp.array([[[1.0], [0.0]], [[0.0], [1.0]]])
        >>> right = jnp.array([[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]])
        >>> delta = LowRankDelta(left, right)
        >>> delta.weighted_sum(jnp.array([1.0, 0.5]).reshape(2, 1, 1)).tolist()
        [[1.0, 2.0, 3.0], [2.0, 2.5, 3.0]]
    """

    left: Float[Array, "K m r"]
    right: Float[Array, "K r n"]

    def weighted_sum(self, scale: Float[Array, "K ..."]) -> Float[Array, "m n"]:
        """Returns one product of matrices of rank K r; no expert's own product exists."""
        left, right = self.scaled(scale)
        return jnp.dot(
            left.astype(jnp.float32),
            right.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )

    def product(
        self, x: Float[Array, "N n"], scale: Float[Array, "K ..."]
    ) -> Float[Array, "N m"] | None:
        """Returns the product through the narrow middle, or None where the sum is less work.

        A step is a forward and a backward pass. Through the middle that is `6 N K r (m + n)`; with
        the sum it is `6 m n K r` to make it and to part its gradient, and `2 N m n` for that
        gradient, which only the sum needs.
        """
        experts, m, rank = self.left.shape
        middle, n = experts * rank, self.right.shape[-1]
        if 3 * len(x) * middle * (m + n) > 3 * m * n * middle + len(x) * m * n:
            return None
        left, right = self.scaled(scale)
        return (x @ right.astype(x.dtype).T) @ left.astype(x.dtype).T

    def rows(self, index: Int[Array, "..."]) -> "LowRankRows":
        """Returns the deltas of `parameter[index]`."""
        return LowRankRows(jnp.take(self.left, index, axis=1), self.right)

    def in_pieces(self, pieces: int, *, stacked: bool, seed: int | None = None) -> "LowRankPieces":
        """Returns the same factors; entries exist one expert and one layer at a time."""
        size, layers = self.left.shape[-2] * self.right.shape[-1], self.left.shape[:stacked]
        order = random_order(size, seed, abstract=is_abstract(self))
        position = lay_out(lambda numpy, order: positions_in(numpy, order, layers), order)
        return LowRankPieces(self.left, self.right, position, pieces)

    def by_direction(self, rank: int | None) -> FactoredDelta:
        """Returns the singular value decomposition of every delta, from that of its factors."""

        def decompose(
            numpy: ModuleType, left: Float[Array, "K m r"], right: Float[Array, "K r n"]
        ) -> FactoredDelta:
            q_left, r_left = numpy.linalg.qr(left.astype(np.float32))
            q_right, r_right = numpy.linalg.qr(right.astype(np.float32).swapaxes(-1, -2))
            u, s, v = numpy.linalg.svd(r_left @ r_right.swapaxes(-1, -2), full_matrices=False)
            left = (q_left @ u) * s[..., None, :]
            right = v @ q_right.swapaxes(-1, -2)
            directions = left.shape[-1]
            rest = None
            if rank is None:
                return FactoredDelta(left, right, None)
            if rank < directions:
                rest = LowRankDelta(left[..., rank:], right[..., rank:, :])
            elif rank > directions:
                missing = [(0, 0)] * (left.ndim - 1) + [(0, rank - directions)]
                left = numpy.pad(left, missing)
                right = numpy.pad(right, [*missing[:-2], missing[-1], missing[-2]])
            return FactoredDelta(left[..., :rank], right[..., :rank, :], rest)

        return lay_out(decompose, self.left, self.right)

    def norms(self, *, stacked: bool) -> Float[Array, "... K"]:
        """Returns the Frobenius norm of each delta: the root of `tr(left^T left right right^T)`."""
        left, right = self.left.astype(jnp.float32), self.right.astype(jnp.float32)
        exact = jax.lax.Precision.HIGHEST
        grams = (
            jnp.einsum("...mr,...ms->...rs", left, left, precision=exact),
            jnp.einsum("...rn,...sn->...rs", right, right, precision=exact),
        )
        return jnp.sqrt(jnp.maximum((grams[0] * grams[1]).sum((-1, -2)), 0))

    def scaled(
        self, scale: Float[Array, "K ..."]
    ) -> tuple[Float[Array, "m Kr"], Float[Array, "Kr n"]]:
        """Returns the factors of the weighted sum: all experts' side by side, and scaled."""
        experts, m, rank = self.left.shape
        n = self.right.shape[-1]
        scale = scale.astype(jnp.float32)
        left, right = self.left, self.right
        if scale.shape == (experts, 1, n) and n > 1:
            right = right * scale
        elif scale.shape in ((experts, 1, 1), (experts, m, 1)):
            left = left * scale
        else:
            raise ValueError(f"scale {scale.shape} is none for rows or columns of {(m, n)}")
        return left.swapaxes(0, 1).reshape(m, experts * rank), right.reshape(experts * rank, n)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankRows:
    """Rows of a table whose deltas are low-rank.

    Attributes:
        left: `[K, ..., r]`, one row for each index.
        right: `[K, r, n]`.
    """

    left: Float[Array, "K ... r"]
    right: Float[Array, "K r n"]

    def weighted_sum(self, scale: Float[Array, "K ..."]) -> Float[Array, "... n"]:
        """Returns the sum over experts of the rows; the scale is by row, or by column."""
        scale = scale.astype(jnp.float32)
        left, right = self.left.astype(jnp.float32), self.right.astype(jnp.float32)
        if scale.shape[-1] == 1:
            left = left * scale
        else:
            right = right * scale.reshape(scale.shape[0], 1, scale.shape[-1])
        return jnp.einsum("k...r,krn->...n", left, right, precision=jax.lax.Precision.HIGHEST)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankPieces:
    """Low-rank deltas with a coefficient for each piece of the flattened parameter.

    Attributes:
        left: `[K, m, r]`.
        right: `[K, r, n]`.
        position: `[m n]`, the place of each entry among the pieces, or None where they follow
            each other.
        pieces: Their number.

    A stacked parameter has a leading axis of length L on all arrays.
    """

    left: Float[Array, "K m r"]
    right: Float[Array, "K r n"]
    position: Int[Array, " size"] | None
    pieces: int = dataclasses.field(metadata={"static": True})

    def weighted_sum(self, scale: Float[Array, "K pieces 1"]) -> Float[Array, "m n"]:
        """Returns the sum over experts, of whom one at a time is multiplied out."""
        shape = (self.left.shape[1], self.right.shape[2])
        size = prod(shape)
        length = ceil(size / self.pieces)

        @jax.checkpoint
        def of_expert(by_piece: Array, left: Array, right: Array) -> Float[Array, "m n"]:
            if self.position is None:
                spread = jnp.broadcast_to(by_piece, (self.pieces, length)).reshape(-1)[:size]
            else:
                spread = by_piece[self.position // length, 0]
            entries = jnp.dot(
                left.astype(jnp.float32),
                right.astype(jnp.float32),
                precision=jax.lax.Precision.HIGHEST,
            )
            return spread.reshape(shape) * entries

        def add(total: Array, expert: tuple[Array, Array, Array]) -> tuple[Array, None]:
            return total + of_expert(*expert), None

        experts = (scale.astype(jnp.float32), self.left, self.right)
        return jax.lax.scan(add, jnp.zeros(shape, jnp.float32), experts)[0]

    def product(self, x: Float[Array, "N n"], scale: Float[Array, "K ..."]) -> None:
        """Returns None: the merged weights are summed first."""
        return None

    def rows(self, index: Int[Array, "..."]) -> None:
        """Returns None: a piece is no row, so that the merged weights are summed first."""
        return None
