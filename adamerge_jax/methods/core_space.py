"""The matrices of a tensor's task vectors, in bases of the directions that they change.

K adapters of rank r change a matrix `[m, n]` within K r directions on either side. In orthonormal
bases of these all task vectors are matrices of K r rows and columns, with the same singular values.
A merge that treats all orthonormal bases alike may be made of the small ones (Core Space Merging,
Panariello et al., NeurIPS 2025).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adamerge_jax.methods.by_tensor import Tensor

EXACT = jax.lax.Precision.HIGHEST


class Matrices(NamedTuple):
    """The task vectors of a matrix `[m, n]`: `tau_k = left values[k] right^T`.

    Attributes:
        values: `[K, p, q]`.
        left: `[m, p]` with orthonormal columns, or None for the identity.
        right: `[n, q]` with orthonormal columns, or None for the identity.
    """

    values: Float[Array, "K p q"]
    left: Float[Array, "m p"] | None
    right: Float[Array, "n q"] | None

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix, `(m, n)`."""
        _, height, width = self.values.shape
        return (
            height if self.left is None else self.left.shape[0],
            width if self.right is None else self.right.shape[0],
        )

    def from_left(self, matrix: Float[Array, "p a"]) -> Float[Array, "m a"]:
        """Returns columns that are given in the left basis, entry by entry."""
        return matrix if self.left is None else jnp.dot(self.left, matrix, precision=EXACT)

    def from_right(self, matrix: Float[Array, "a q"]) -> Float[Array, "a n"]:
        """Returns rows that are given in the right basis, entry by entry."""
        return matrix if self.right is None else jnp.dot(matrix, self.right.T, precision=EXACT)

    def entries(self, matrix: Float[Array, "p q"]) -> Float[Array, "m n"]:
        """Returns a matrix that is given in both bases, entry by entry."""
        return self.from_right(self.from_left(matrix))


def matrices_of(tensor: Tensor) -> Matrices:
    """Returns the task vectors of a matrix, in small bases where the experts are adapters.

    Args:
        tensor: A tensor of at least two axes; those after the first are one axis of the matrix.
    """
    factors = tensor.factors
    if factors is not None:
        experts, _, rank = factors.left.shape
        if experts * rank < min(tensor.base.shape):
            return _in_small_bases(factors.left, factors.right)
    return Matrices(tensor.deltas.reshape(*tensor.deltas.shape[:2], -1), None, None)


@jax.jit
def _in_small_bases(left: Float[Array, "K m r"], right: Float[Array, "K r n"]) -> Matrices:
    experts, height, rank = left.shape
    side_by_side = left.swapaxes(0, 1).reshape(height, experts * rank)
    left_basis, left_factors = jnp.linalg.qr(side_by_side)
    right_basis, right_factors = jnp.linalg.qr(right.reshape(experts * rank, -1).T)
    values = jnp.einsum(
        "pkr,qkr->kpq",
        left_factors.reshape(-1, experts, rank),
        right_factors.reshape(-1, experts, rank),
        precision=EXACT,
    )
    return Matrices(values, left_basis, right_basis)
