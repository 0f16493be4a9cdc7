"""Task vectors as low-rank factors, which are never multiplied out as a whole: LoRA."""

import dataclasses
from math import ceil, prod

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from adamerge_jax.devices import fetch
from adamerge_jax.task_vectors.dense import positions_in, random_order
from adamerge_jax.task_vectors.factored import FactoredDelta


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
        """One product of matrices of rank K r; no expert's own product exists."""
        left, right = self._scaled(scale)
        return jnp.dot(
            left.astype(jnp.float32),
            right.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )

    def product(
        self, x: Float[Array, "N n"], scale: Float[Array, "K ..."]
    ) -> Float[Array, "N m"] | None:
        """Through the narrow middle, or None where a step with the sum takes fewer operations.

        A step is a forward and a backward pass. Through the middle that is `6 N K r (m + n)`; with
        the sum it is `6 m n K r` to make it and to part its gradient, and `2 N m n` for that
        gradient, which only the sum needs.
        """
        experts, m, rank = self.left.shape
        middle, n = experts * rank, self.right.shape[-1]
        if 3 * len(x) * middle * (m + n) > 3 * m * n * middle + len(x) * m * n:
            return None
        left, right = self._scaled(scale)
        return (x @ right.astype(x.dtype).T) @ left.astype(x.dtype).T

    def rows(self, index: Int[Array, "..."]) -> "LowRankRows":
        """The deltas of `parameter[index]`."""
        return LowRankRows(jnp.take(self.left, index, axis=1), self.right)

    def in_pieces(self, pieces: int, *, stacked: bool, seed: int | None = None) -> "LowRankPieces":
        """The same factors; entries exist one expert and one layer at a time."""
        position = None
        if seed is not None:
            order = random_order(self.left.shape[-2] * self.right.shape[-1], seed)
            position = positions_in(order, self.left.shape[:stacked])
        return LowRankPieces(self.left, self.right, position, pieces)

    def by_direction(self, rank: int) -> FactoredDelta:
        """The singular value decomposition of every delta, from that of its factors."""
        q_left, r_left = np.linalg.qr(fetch(self.left).astype(np.float32))
        q_right, r_right = np.linalg.qr(fetch(self.right).astype(np.float32).swapaxes(-1, -2))
        u, s, v = np.linalg.svd(r_left @ r_right.swapaxes(-1, -2), full_matrices=False)
        left = (q_left @ u) * s[..., None, :]
        right = v @ q_right.swapaxes(-1, -2)
        found = left.shape[-1]
        rest = None
        if rank < found:
            rest = LowRankDelta(jnp.asarray(left[..., rank:]), jnp.asarray(right[..., rank:, :]))
        elif rank > found:
            missing = [(0, 0)] * (left.ndim - 1) + [(0, rank - found)]
            left = np.pad(left, missing)
            right = np.pad(right, [*missing[:-2], missing[-1], missing[-2]])
        return FactoredDelta(jnp.asarray(left[..., :rank]), jnp.asarray(right[..., :rank, :]), rest)

    def norms(self, *, stacked: bool) -> Float[Array, "... K"]:
        """Frobenius norm of each expert's delta: `tr(left^T left right right^T)`, its root."""
        left, right = self.left.astype(jnp.float32), self.right.astype(jnp.float32)
        exact = jax.lax.Precision.HIGHEST
        grams = (
            jnp.einsum("...mr,...ms->...rs", left, left, precision=exact),
            jnp.einsum("...rn,...sn->...rs", right, right, precision=exact),
        )
        return jnp.sqrt(jnp.maximum((grams[0] * grams[1]).sum((-1, -2)), 0))

    def _scaled(
        self, scale: Float[Array, "K ..."]
    ) -> tuple[Float[Array, "m Kr"], Float[Array, "Kr n"]]:
        """The factors of all experts side by side, with the scale in whichever has its axis."""
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
        """The sum over experts of the rows; the scale is one for each row, or for each column."""
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
        position: `[m n]`, where each entry lies among the pieces, or None where they follow each
            other.
        pieces: Their number.

    A stacked parameter has a leading axis of length L on all arrays.
    """

    left: Float[Array, "K m r"]
    right: Float[Array, "K r n"]
    position: Int[Array, " size"] | None
    pieces: int = dataclasses.field(metadata={"static": True})

    def weighted_sum(self, scale: Float[Array, "K pieces 1"]) -> Float[Array, "m n"]:
        """The sum over experts, of whom one at a time is multiplied out."""
        shape = (self.left.shape[1], self.right.shape[2])
        size = prod(shape)
        length = ceil(size / self.pieces)

        @jax.checkpoint
        def of_expert(own: Array, left: Array, right: Array) -> Float[Array, "m n"]:
            if self.position is None:
                spread = jnp.broadcast_to(own, (self.pieces, length)).reshape(-1)[:size]
            else:
                spread = own[self.position // length, 0]
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
        """None: the merged weights are summed first."""
        return None

    def rows(self, index: Int[Array, "..."]) -> None:
        """None: a piece is no row, so that the merged weights are summed first."""
        return None
