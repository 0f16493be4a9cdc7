"""Euclidean projection onto the simplex: coefficients that make the merge an average of models."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def project_to_simplex(values: Float[Array, "G K ..."]) -> Float[Array, "G K ..."]:
    """Returns the nearest coefficients that are at least 0 and sum to 1 over the experts.

        w_k = max(v_k - theta, 0),  theta such that sum_k w_k = 1

    Source: Duchi et al., Efficient Projections onto the l1-Ball for Learning in High Dimensions,
    ICML 2008, figure 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.coefficients.simplex import project_to_simplex
        >>> project_to_simplex(jnp.array([[1.0, 0.5, -1.0]])).tolist()
        [[0.75, 0.25, 0.0]]
    """
    descending = -jnp.sort(-values, axis=1)
    count = jnp.arange(1, values.shape[1] + 1).reshape(1, -1, *(1 for _ in values.shape[2:]))
    thresholds = (jnp.cumsum(descending, axis=1) - 1) / count
    support = (descending > thresholds).sum(1, keepdims=True)
    theta = jnp.take_along_axis(thresholds, support - 1, axis=1)
    return jnp.maximum(values - theta, 0)


def project_to_simplex_with_base(values: Float[Array, "G K ..."]) -> Float[Array, "G K ..."]:
    """Returns the nearest coefficients that are at least 0 and sum to at most 1 over the experts.

    The rest of 1 is the base's weight in the average.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.coefficients.simplex import project_to_simplex_with_base
        >>> project_to_simplex_with_base(jnp.array([[0.5, -0.25], [1.5, 0.0]])).tolist()
        [[0.5, 0.0], [1.0, 0.0]]
    """
    positive = jnp.maximum(values, 0)
    is_within = positive.sum(1, keepdims=True) <= 1
    return jnp.where(is_within, positive, project_to_simplex(values))
