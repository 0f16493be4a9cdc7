"""The granularity by singular directions of what each expert changed in a matrix."""

from adamerge_jax.coefficients.granularity import (
    Granularity,
    Shapes,
    Split,
    require_whole,
    split_tensors,
)
from adamerge_jax.errors import InputError


def singular(shapes: Shapes, rank: int | None = None) -> Granularity:
    """One coefficient per expert and leading singular direction of what it changed in a matrix.

    With `tau_k = sum_i s_ki u_ki v_ki^T`, the directions `i <= rank` have a coefficient each and
    the rest of the sum has one more. (AdaRank, Lee et al., ICLR 2026, has all directions and the
    constraint `binary`; cf. TSV, Gargiulo et al., CVPR 2025.) Vectors, embedding tables and tensors
    that are no matrix have one coefficient each.

    Args:
        shapes: Shapes of the parameters.
        rank: Number of leading directions; by default all, and there is no rest. Factors of an
            adapter have as many directions as their rank, and coefficients beyond it change
            nothing.

    Raises:
        InputError: The rank is no whole number, or a matrix has fewer singular directions.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax import DenseDelta
        >>> from adamerge_jax.coefficients.granularities import constant, singular
        >>> shapes = {"dense.weight": (4, 3)}
        >>> granularity = singular(shapes, rank=2)
        >>> granularity.init(constant(shapes, experts=2, value=0.3))["dense.weight"].shape
        (1, 2, 3)
        >>> delta = DenseDelta(jnp.ones((2, 4, 3)))  # is to be laid out anew for such scales
        >>> granularity.prepare("dense.weight", delta).left.shape  # [K, m, rank]
        (2, 4, 2)
    """
    if rank is not None:
        require_whole("rank", rank, 1)

    def split(name: str, shape: tuple[int, ...]) -> Split | None:
        if len(shape) != 2:
            return None
        if rank is None:
            return Split(min(shape), lambda values: values, "by singular direction")
        if rank > min(shape):
            raise InputError(
                f"{name} of shape {shape} has {min(shape)} singular "
                f"directions, fewer than rank {rank}"
            )
        return Split(rank + 1, lambda values: values, "by singular direction")

    return split_tensors(
        shapes, split, prepare=lambda name, delta: delta.by_direction(rank)
    )._replace(cuts_rows=True)
