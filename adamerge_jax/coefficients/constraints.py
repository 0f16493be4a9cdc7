"""Constraints: the values that merge coefficients may take."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from adamerge_jax.coefficients.binary import from_mask, to_mask
from adamerge_jax.coefficients.concrete import from_soft_mask, to_soft_mask
from adamerge_jax.coefficients.positions import (
    from_positions,
    keep_scale_positive,
    to_positions,
)
from adamerge_jax.coefficients.simplex import project_to_simplex, project_to_simplex_with_base


class Constraint(NamedTuple):
    """The values that coefficients may take.

    Attributes:
        apply: From what is learned for one group, an array or a tree of arrays, to its coefficients
            `[G, K, ...]`.
        invert: From coefficients to what `apply` maps to them.
        allows: From an array of K coefficients to True where they are in the range of `apply`.
        range: The range in words, for error messages.
        project: From what a step of the optimizer makes of that array or tree to the nearest one
            that is allowed; by default all are.
    """

    apply: Callable[[PyTree], Array]
    invert: Callable[[Array], PyTree]
    allows: Callable[[np.ndarray], bool]
    range: str
    project: Callable[[PyTree], PyTree] = lambda raw: raw


@jax.jit  # traced once for all groups of a shape
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
    "simplex": Constraint(
        lambda raw: raw,
        project_to_simplex,
        lambda values: bool((values >= 0).all() and np.isclose(values.sum(), 1)),
        "at least 0 and summing to 1 over the experts (1/K each)",
        project_to_simplex,
    ),
    "simplex_with_base": Constraint(
        lambda raw: raw,
        project_to_simplex_with_base,
        lambda values: bool((values >= 0).all() and values.sum() <= 1 + _SMALLEST),
        "at least 0 and summing to at most 1 over the experts (1/K each at most)",
        project_to_simplex_with_base,
    ),
    "positions": Constraint(
        from_positions,
        to_positions,
        lambda values: bool((values >= 0).all()),
        "at least 0",
        keep_scale_positive,
    ),
    "binary": Constraint(
        from_mask,
        to_mask,
        lambda values: True,
        "for each expert and tensor one number or 0",
    ),
    "concrete": Constraint(
        from_soft_mask,
        to_soft_mask,
        lambda values: True,
        "for each expert and tensor one number, times a mask that experts share",
    ),
}
"""Constraints by their names in a recipe: the values that coefficients `[G, K, ...]` may take.

`free`: any number. `clip`: cut to [0, 1] (AdaMerging, Yang et al., ICLR 2024). `sigmoid`: between 0
and 1 (Expert Merging, Zhang et al., 2025). `softmax`: positive, the K experts of a group sum to 1.
`simplex`: the same with zeros, by projection after every step (Duchi et al., ICML 2008).
`simplex_with_base`: at least 0 with a sum of at most 1, so that the merge is an average of base and
experts. `positions`: a softmax over base and experts, times a scale that is learned too (Self
Positioning, Li et al., 2024). `binary`: one number for each expert and tensor, times a mask of 0
and 1 over the parts of the tensor (AdaRank, Lee et al., ICLR 2026). `concrete`: the same with a
soft mask that all experts share (Tang et al., 2023).

Examples:
    >>> import jax.numpy as jnp
    >>> from adamerge_jax import CONSTRAINTS
    >>> list(CONSTRAINTS)
    ['free', 'clip', 'sigmoid', 'softmax', 'simplex', 'simplex_with_base', 'positions', 'binary',
    'concrete']
    >>> CONSTRAINTS["clip"].apply(jnp.array([[-0.5, 0.25, 2.0]])).tolist()
    [[0.0, 0.25, 1.0]]
"""
