"""Coefficients that are one number for each expert and tensor, times a soft mask of all experts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

TEMPERATURE = 0.5
"""The divisor of a mask's logits, as the authors have it."""


def from_soft_mask(raw: dict[str, Array]) -> Float[Array, "G K ..."]:
    """Returns `lambda_k m_i / mean(m)` with `m_i = sigmoid(logit_i / temperature)`.

    i counts the parts of a tensor, over which the mean is. Tensors in one piece have no mask.

    Args:
        raw: `scale` `[G, K]`, and for tensors in parts `logits` `[G, ...]`, with noise or without.

    Source: Concrete subspace learning, Tang et al., 2023, with the temperature of the authors'
    code.
    """
    if "logits" not in raw:
        return raw["scale"]
    mask = jax.nn.sigmoid(raw["logits"] / TEMPERATURE)
    mask = mask / mask.mean(range(1, mask.ndim), keepdims=True)
    scale = raw["scale"].reshape(*raw["scale"].shape, *(1 for _ in mask.shape[1:]))
    return scale * mask[:, None]


def to_soft_mask(values: Float[Array, "G K ..."]) -> dict[str, Array]:
    """Returns the mean coefficient of each expert and tensor, and a mask with nothing in it yet."""
    if values.ndim == 2:
        return {"scale": values}
    parts = tuple(range(2, values.ndim))
    return {"scale": values.mean(parts), "logits": jnp.zeros_like(values[:, 0])}
