"""Coefficients as a position between base and experts, and a scale."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_SMALLEST = 1e-6
"""The least share of a start, whose logarithm is finite."""


def from_positions(raw: dict[str, Array]) -> Float[Array, "G K ..."]:
    """Returns `lambda_k = scale * softmax(position)_k`, where position 0 is the base's.

    Args:
        raw: `position` `[G, K + 1, ...]` and `scale` `[G, 1, ...]`.
    """
    return raw["scale"] * jax.nn.softmax(raw["position"], axis=1)[:, 1:]


def to_positions(values: Float[Array, "G K ..."]) -> dict[str, Array]:
    """Returns a position and a scale of these coefficients, with a share of 1/(K+1) for the base.

    The same coefficients have many: more scale and more of the base is the same.
    """
    experts = values.shape[1]
    total = jnp.maximum(values.sum(1, keepdims=True), _SMALLEST)
    scale = total * ((experts + 1) / experts)
    shares = jnp.concatenate([scale / (experts + 1), values], axis=1) / scale
    return {"position": jnp.log(jnp.maximum(shares, _SMALLEST)), "scale": scale}


def keep_scale_positive(raw: dict[str, Array]) -> dict[str, Array]:
    """Returns the same position with a scale of at least 0."""
    return raw | {"scale": jnp.maximum(raw["scale"], 0)}
