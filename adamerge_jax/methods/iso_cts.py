"""Iso-CTS (Marczak et al., ICML 2025): Iso-C with directions of single experts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adamerge_jax.methods.by_matrix import by_matrix
from adamerge_jax.methods.core_space import EXACT, Matrices
from adamerge_jax.methods.iso_c import isotropic
from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.methods.singular import Directions, decompose, nearest_orthonormal


def iso_cts(coefficient: float = 1.0, common: float = 0.8) -> MergeMethod:
    """Returns the method that replaces the sum's small directions by the experts' own, then Iso-C.

    `U_c` are the leading left singular vectors of `sum_k tau_k`, a part `common` of all of them.
    The others are replaced, in equal shares, by the leading directions of each
    `tau_k - U_c U_c^T tau_k`. All left vectors together are replaced by the nearest orthonormal
    ones, the right ones likewise, and all directions get the mean of their singular values. Tensors
    that are no matrices get the mean of the task vectors.

    Isotropic merging in common and task-specific subspaces, Marczak et al., No Task Left Behind,
    ICML 2025, section 4.2, algorithm 2. The directions are those within the rank of the sum; the
    authors' code fills a sum of lower rank, as that of adapters is, with any vectors.

    Args:
        coefficient: The factor of the merged task vectors, which the paper chooses on validation
            data.
        common: The part of the directions that are the sum's, from 0 to 1. It is rounded so that
            the others are shared equally.

    Raises:
        ValueError: An argument is outside of its range.
    """
    if not 0 <= common <= 1:
        raise ValueError(f"common is {common}, expected from 0 to 1")

    def merged(matrices: Matrices) -> Float[Array, "m n"]:
        directions = decompose(matrices.values.sum(0))
        rank = directions.rank()
        if not rank:
            return jnp.zeros(matrices.shape)
        experts = len(matrices.values)
        share = _share(rank, experts, common)
        shared = directions.leading(rank - share * experts)
        parts = [_beyond(shared.left, matrix).leading(share) for matrix in matrices.values]
        parts.append(shared)
        left = nearest_orthonormal(jnp.concatenate([part.left for part in parts], axis=1))
        sizes = jnp.concatenate([part.sizes for part in parts])
        right = nearest_orthonormal(jnp.concatenate([part.right.T for part in parts], axis=1))
        return matrices.entries(isotropic(Directions(left, sizes, right.T)))

    return by_matrix(merged, coefficient)


def _share(rank: int, experts: int, common: float) -> int:
    """Returns the number of directions of each expert."""
    share = round((rank - int(rank * common)) / experts)
    return min(share, rank // experts)  # rounding up may ask for more than there are


@jax.jit
def _beyond(shared: Float[Array, "p c"], matrix: Float[Array, "p q"]) -> Directions:
    """Returns the directions of one expert's matrix apart from the shared left ones."""
    inside = jnp.dot(shared.T, matrix, precision=EXACT)
    remainder = matrix - jnp.dot(shared, inside, precision=EXACT)
    return decompose(remainder, jnp.linalg.norm(matrix))
