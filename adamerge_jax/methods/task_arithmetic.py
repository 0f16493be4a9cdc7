"""Task arithmetic (Ilharco et al., ICLR 2023): one coefficient for all experts and parameters."""

from jaxtyping import Array, Float

from adamerge_jax.coefficients.granularities import Shapes, constant, task


def task_arithmetic(
    shapes: Shapes, experts: int, coefficient: float
) -> dict[str, Float[Array, "..."]]:
    """Scales of `theta_base + coefficient * sum_k tau_k`.

    Args:
        shapes: Shapes of the mixed parameters, `(L, *shape)` where stacked.
        experts: K.
        coefficient: The one lambda.

    Returns:
        A scale `[K, ...]` per parameter (`[L, K, ...]` where stacked).
    """
    granularity = task(shapes)
    return granularity.scales(granularity.init(constant(shapes, experts, coefficient)))


def average(shapes: Shapes, experts: int) -> dict[str, Float[Array, "..."]]:
    """Scales of the plain average of the experts (Wortsman et al., ICML 2022)."""
    return task_arithmetic(shapes, experts, 1 / experts)
