"""Terms that are added to the objective to keep coefficients where they should be.

A regularizer is a function of options that returns a function `(coefficients, start) -> scalar`,
both by group, `[G, K, ...]`. All of them are means over groups and sums over the K experts, so that
a weight means the same for few coefficients and for many.

Examples:
    >>> import jax.numpy as jnp
    >>> from adamerge_jax.objectives.regularizers import distance
    >>> start, now = {"all": jnp.zeros((1, 2))}, {"all": jnp.ones((1, 2))}  # [G, K]
    >>> float(distance()(now, start))
    2.0
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from adamerge_jax.coefficients.granularities import Values
from adamerge_jax.registry import call_registered

Regularizer = Callable[[Values, Values], Float[Array, ""]]
"""`(coefficients, coefficients at the start) -> term of the objective`."""


def distance(p: float = 1.0) -> Regularizer:
    """`sum_k |lambda_k - start_k|^p`, mean over groups.

    With p = 1 that of Expert Merging (Zhang et al., 2025), with p = 2 a pull that grows.

    Args:
        p: The power, from 1 to 100.

    Raises:
        ValueError: p is not from 1 to 100.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.objectives.regularizers import distance
        >>> start, now = {"all": jnp.array([[0.5, 0.5]])}, {"all": jnp.array([[1.0, 0.25]])}
        >>> float(distance(p=1)(now, start))
        0.75
    """
    if not 1 <= p <= 100:
        raise ValueError(f"p is {p}, expected at least 1 and at most 100")
    return lambda values, start: _mean_over_groups(
        {group: (_magnitude(values[group] - start[group]) ** p).sum(1) for group in values}
    )


def lp_norm(p: float = 1.0) -> Regularizer:
    """`||lambda||_p` over the experts, mean over groups: that of aTLAS.

    Args:
        p: The norm, from 1 to 100.

    Raises:
        ValueError: p is not from 1 to 100.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.objectives.regularizers import lp_norm
        >>> values = {"all": jnp.array([[3.0, 4.0]])}  # [G, K]
        >>> float(lp_norm(p=2)(values, values))
        5.0
    """
    if not 1 <= p <= 100:
        raise ValueError(f"p is {p}, expected at least 1 and at most 100")

    def norm(values: Float[Array, "G K ..."]) -> Float[Array, "G ..."]:
        powers = (_magnitude(values) ** p).sum(1)
        # The root has no gradient at 0, where a coefficient may start.
        return jnp.where(powers > 0, jnp.where(powers > 0, powers, 1.0) ** (1 / p), 0.0)

    return lambda values, start: _mean_over_groups(
        {group: norm(array) for group, array in values.items()}
    )


def expert_entropy() -> Regularizer:
    """Entropy in nats of `|lambda_k| / sum_j |lambda_j|`, mean over groups.

    It is low where few experts share a group. This project's own.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.objectives.regularizers import expert_entropy
        >>> shared, alone = {"all": jnp.array([[0.5, 0.5]])}, {"all": jnp.array([[1.0, 0.0]])}
        >>> round(float(expert_entropy()(shared, shared)), 2)
        0.69
        >>> abs(round(float(expert_entropy()(alone, alone)), 2))
        0.0
    """

    def entropy(values: Float[Array, "G K ..."]) -> Float[Array, "G ..."]:
        share = _magnitude(values) / jnp.maximum(_magnitude(values).sum(1, keepdims=True), 1e-12)
        return -(share * jnp.log(jnp.maximum(share, 1e-12))).sum(1)

    return lambda values, start: _mean_over_groups(
        {group: entropy(array) for group, array in values.items()}
    )


REGULARIZERS: dict[str, Callable[..., Regularizer]] = {
    "distance": distance,
    "lp_norm": lp_norm,
    "expert_entropy": expert_entropy,
}
"""Regularizers by their names in a recipe."""


def make_regularizer(name: str, options: Mapping[str, Any]) -> Regularizer:
    """Makes the regularizer that a recipe names.

    Raises:
        InputError: There is no such regularizer, or it refuses an option.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.objectives.regularizers import make_regularizer
        >>> values = {"all": jnp.array([[1.0, 2.0]])}  # [G, K]
        >>> float(make_regularizer("lp_norm", {"p": 1})(values, values))
        3.0
    """
    return call_registered("regularizers", REGULARIZERS, name, options, returns=Callable)


def _magnitude(values: Array) -> Array:
    """Returns `|x|` with gradient 0 at 0, where coefficients start; that of `jnp.abs` is 1."""
    return values * jnp.sign(values)


def _mean_over_groups(values: Mapping[str, Float[Array, "G ..."]]) -> Float[Array, ""]:
    return sum(array.sum() for array in values.values()) / sum(
        array.size for array in values.values()
    )
