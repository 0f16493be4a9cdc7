"""Similarities of embeddings, float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def unit_length(embeddings: Float[Array, "... H"]) -> Float[Array, "... H"]:
    """Scales vectors to length 1; a vector of zeros stays one, also in gradients."""
    wide = embeddings.astype(jnp.float32)
    squares = jnp.square(wide).sum(-1, keepdims=True)
    return wide * jnp.where(squares > 0, jax.lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)
