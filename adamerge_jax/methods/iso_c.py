"""Iso-C (Marczak et al., ICML 2025): the summed task vectors with equal singular values."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from adamerge_jax.methods.by_matrix import by_matrix
from adamerge_jax.methods.core_space import EXACT, Matrices
from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.methods.singular import Directions, decompose


def iso_c(coefficient: float = 1.0) -> MergeMethod:
    """Returns the method that gives all singular directions of the sum their mean singular value.

    With `sum_k tau_k = U S V^T` the merged matrix is `mean(S) U V^T`. Tensors that are no matrices
    get the mean of the task vectors.

    Isotropic merging in common subspace, Marczak et al., No Task Left Behind, ICML 2025, section
    4.1, algorithm 1. Mean and directions are those within the rank of the sum; the authors' code
    fills a sum of lower rank, as that of adapters is, with any vectors.

    Args:
        coefficient: The factor of the merged task vectors, which the paper chooses on validation
            data.

    Raises:
        ValueError: The coefficient is beyond 1e6.
    """

    def merged(matrices: Matrices) -> Float[Array, "m n"]:
        return matrices.entries(isotropic(decompose(matrices.values.sum(0))))

    return by_matrix(merged, coefficient)


def isotropic(directions: Directions) -> Float[Array, "p q"]:
    """Returns the matrix of these directions, all with the mean of their singular values."""
    mean = directions.sizes.sum() / jnp.maximum(jnp.count_nonzero(directions.sizes), 1)
    return mean * jnp.dot(directions.left, directions.right, precision=EXACT)
