"""Coefficients that are one number for each expert and tensor, times a mask of 0 and 1."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

TEMPERATURE = 10.0
"""The divisor of a mask's logits, as the authors have it."""

_FIRST_LOGIT = 0.1
"""The logit of a part that starts within the merge; one that does not has its negative."""


def from_mask(raw: dict[str, Array]) -> Float[Array, "G K ..."]:
    """Returns `lambda_k [sigmoid(logit_ki / temperature) > 1/2]`, i over the parts of a tensor.

    The step to 0 and 1 has no gradient: the sigmoid's takes its place (straight through). Tensors
    in one piece have no mask.

    Args:
        raw: `scale` `[G, K]`, and for tensors in parts `logits` `[G, K, ...]`.

    Source: AdaRank, Lee et al., ICLR 2026, with the temperature of the authors' code.
    """
    if "logits" not in raw:
        return raw["scale"]
    logits = raw["logits"]
    soft = jax.nn.sigmoid(logits / TEMPERATURE)
    # The difference is 0 and has the gradient of `soft`.
    mask = (logits > 0).astype(logits.dtype) + (soft - jax.lax.stop_gradient(soft))
    return raw["scale"].reshape(*raw["scale"].shape, *(1 for _ in logits.shape[2:])) * mask


def to_mask(values: Float[Array, "G K ..."]) -> dict[str, Array]:
    """Returns the number and the mask of coefficients: the mean of those that are not 0, and these.

    Where all are 0 the number is, and not the mask: it would never learn again.
    """
    if values.ndim == 2:
        return {"scale": values}
    parts = tuple(range(2, values.ndim))
    chosen = values != 0
    chosen |= ~chosen.any(parts, keepdims=True)
    scale = jnp.where(chosen, values, 0).sum(parts) / chosen.sum(parts)
    return {"scale": scale, "logits": jnp.where(chosen, _FIRST_LOGIT, -_FIRST_LOGIT)}
