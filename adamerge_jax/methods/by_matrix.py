"""Merge methods for matrices, with the mean of the task vectors for all other tensors."""

from collections.abc import Callable

from jaxtyping import Array, Float

from adamerge_jax.methods.by_tensor import Tensor, by_tensor
from adamerge_jax.methods.core_space import Matrices, matrices_of
from adamerge_jax.methods.method import MergeMethod


def by_matrix(
    merged_matrix: Callable[[Matrices], Float[Array, "m n"]], coefficient: float
) -> MergeMethod:
    """Returns the method `theta_base + coefficient * merged` for tensors of two axes.

    For all other tensors, also those with an axis of length 1, `merged` is the mean of the task
    vectors.

    Args:
        merged_matrix: A function from the task vectors of a matrix to the merged one.
        coefficient: The factor of the merged task vectors.

    Raises:
        ValueError: The coefficient is beyond 1e6.
    """
    require_coefficient(coefficient)

    def merged_delta(tensor: Tensor) -> Float[Array, "..."]:
        if tensor.base.ndim == 2 and 1 not in tensor.base.shape:
            return coefficient * merged_matrix(matrices_of(tensor))
        return coefficient * tensor.deltas.mean(0)

    return by_tensor(merged_delta)


def require_coefficient(coefficient: float) -> None:
    """Refuses a factor of merged task vectors that is beyond 1e6.

    Raises:
        ValueError: It is.
    """
    if not abs(coefficient) <= 1e6:
        raise ValueError(f"coefficient is {coefficient}, expected from -1e6 to 1e6")
