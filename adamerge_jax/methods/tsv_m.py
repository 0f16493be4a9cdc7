"""TSV-Merge (Gargiulo et al., CVPR 2025): leading singular vectors of all experts, orthonormal."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from adamerge_jax.methods.by_matrix import by_matrix
from adamerge_jax.methods.core_space import EXACT, Matrices
from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.methods.singular import decompose, nearest_orthonormal


def tsv_m(coefficient: float = 1.0) -> MergeMethod:
    """Returns the method that joins singular vectors of all experts to one orthonormal set.

    Of each expert's matrix `tau_k = U_k S_k V_k^T` the leading `min(m, n) / K` directions stay.
    With `U = [U_1 ... U_K]`, `S = diag(S_1, ..., S_K)` and `V = [V_1 ... V_K]` the merged matrix is
    `U' S V'^T`, where `U'` and `V'` are the nearest matrices with orthonormal columns. Tensors that
    are no matrices get the mean of the task vectors.

    Task Singular Vectors, Gargiulo et al., CVPR 2025, section 4.2, algorithm 1. Directions beyond
    the rank of an expert's matrix are left out; the authors' code takes any vectors there.

    Args:
        coefficient: The factor of the merged task vectors; the paper's is 1.

    Raises:
        ValueError: The coefficient is beyond 1e6.
    """

    def merged(matrices: Matrices) -> Float[Array, "m n"]:
        count = max(min(matrices.shape) // len(matrices.values), 1)
        leading = [decompose(matrix).leading(count) for matrix in matrices.values]
        left = nearest_orthonormal(jnp.concatenate([one.left for one in leading], axis=1))
        right = nearest_orthonormal(jnp.concatenate([one.right.T for one in leading], axis=1))
        sizes = jnp.concatenate([one.sizes for one in leading])
        return matrices.entries(jnp.dot(left * sizes, right.T, precision=EXACT))

    return by_matrix(merged, coefficient)
