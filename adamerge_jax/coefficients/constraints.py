"""Constraints: the values that merge coefficients may take."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


class Constraint(NamedTuple):
    """The values that coefficients may take.

    Attributes:
        apply: From unconstrained arrays `[G, K, ...]` to coefficients.
        invert: From coefficients to an unconstrained array that `apply` maps to them.
        allows: From an array of K coefficients to True where they are in the range of `apply`.
        range: The range in words, for error messages.
    """

    apply: Callable[[Array], Array]
    invert: Callable[[Array], Array]
    allows: Callable[[np.ndarray], bool]
    range: str


def _clip(raw: Array) -> Array:
    """Clips to [0, 1]; the gradient is 1 on the closed interval, as that of `torch.clamp`."""
    inside = (raw >= 0) & (raw <= 1)
    return jnp.where(inside, raw, jax.lax.stop_gradient(jnp.clip(raw, 0, 1)))


_SMALLEST = 1e-6
"""The least distance of a start to the ends of an open range, so that it can leave them again."""


def _logit(values: Array) -> Array:
    inside = jnp.clip(values, _SMALLEST, 1 - _SMALLEST)
    return jnp.log(inside) - jnp.log1p(-inside)


CONSTRAINTS: dict[str, Constraint] = {
    "free": Constraint(lambda raw: raw, lambda values: values, lambda values: True, "any number"),
    "clip": Constraint(
        _clip,
        lambda values: values,
        lambda values: bool(((values >= 0) & (values <= 1)).all()),
        "from 0 to 1",
    ),
    "sigmoid": Constraint(
        jax.nn.sigmoid,
        _logit,
        lambda values: bool(((values > 0) & (values < 1)).all()),
        "between 0 and 1, both excluded",
    ),
    "softmax": Constraint(
        lambda raw: jax.nn.softmax(raw, axis=1),
        lambda values: jnp.log(jnp.maximum(values, _SMALLEST)),
        lambda values: bool((values > 0).all() and np.isclose(values.sum(), 1)),
        "positive and summing to 1 over the experts (1/K each)",
    ),
}
"""Constraints by their names in a recipe: the values that coefficients `[G, K, ...]` may take.

`free`: any number. `clip`: cut to [0, 1] (AdaMerging, Yang et al., ICLR 2024). `sigmoid`: between 0
and 1 (Expert Merging, Zhang et al., 2025). `softmax`: positive, the K experts of a group sum to 1.

Examples:
    >>> import jax.numpy as jnp
    >>> from adamerge_jax import CONSTRAINTS
    >>> list(CONSTRAINTS)
    ['free', 'clip', 'sigmoid', 'softmax']
    >>> CONSTRAINTS["clip"].apply(jnp.array([[-0.5, 0.25, 2.0]])).tolist()
    [[0.0, 0.25, 1.0]]
"""
