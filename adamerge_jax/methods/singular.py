"""Singular value decompositions in which rounding is no direction."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adamerge_jax.methods.core_space import EXACT
from adamerge_jax.task_vectors import rounding


class Directions(NamedTuple):
    """A matrix as `left diag(sizes) right`, d the smaller of its sides.

    Beyond the matrix's rank singular vectors may be any: `sizes`, columns of `left` and rows of
    `right` are 0 there, so that the same matrix gives the same merge everywhere.

    Attributes:
        left: `[p, d]`, left singular vectors.
        sizes: `[d]`, singular values, the largest first.
        right: `[d, q]`, right singular vectors.
    """

    left: Float[Array, "p d"]
    sizes: Float[Array, " d"]
    right: Float[Array, "d q"]

    def leading(self, count: int) -> "Directions":
        """Returns the `count` largest directions."""
        return Directions(self.left[:, :count], self.sizes[:count], self.right[:count])

    def rank(self) -> int:
        """Returns the number of directions that are more than rounding."""
        return int(jnp.count_nonzero(self.sizes))


@jax.jit
def decompose(matrix: Float[Array, "p q"], origin: Float[Array, ""] | float = 0.0) -> Directions:
    """Returns the singular directions of a matrix.

    Args:
        matrix: The matrix.
        origin: The size of what the matrix was computed from, by which its rounding is measured
            where it is over the matrix's largest singular value.
    """
    left, sizes, right = jnp.linalg.svd(matrix, full_matrices=False)
    stays = sizes > rounding.SINGULAR_VALUE * jnp.maximum(sizes[0], origin)
    return Directions(left * stays, sizes * stays, right * stays[:, None])


@jax.jit
def nearest_orthonormal(columns: Float[Array, "p d"]) -> Float[Array, "p d"]:
    """Returns the matrix with orthonormal columns that is nearest to this one.

    `U V^T` of the singular value decomposition `U S V^T`: the solution of the orthogonal Procrustes
    problem. Columns that depend on others share directions with them instead of getting new ones.
    """
    directions = decompose(columns)
    return jnp.dot(directions.left, directions.right, precision=EXACT)
