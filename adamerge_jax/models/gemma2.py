"""Gemma 2 (Gemma Team, 2024): norms on both sides of attention and MLP, and soft caps.

Embeddings are scaled, norms multiply by `1 + weight`, every other layer sees only a window of the
text, and scores and logits are bent into a range.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from adamerge_jax.models.decoder_layers import (
    Attention,
    CausalHead,
    GatedMLP,
    decoder_family,
    windows_by_type,
)
from adamerge_jax.models.layers import Config, Outputs, capped, parameter, unit_mean_square, value


class GemmaNorm(nnx.Module):
    """Division by the root mean square over the last axis, times `1 + weight`, in float32."""

    def __init__(self, features: int, epsilon: float):
        self.weight = parameter(features)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... H"]) -> Float[Array, "... H"]:
        weight = 1 + value(self.weight).astype(jnp.float32)
        return (unit_mean_square(x, self.epsilon) * weight).astype(x.dtype)


class GemmaLayer(nnx.Module):
    """Attention and MLP, each normalised before and after and then added to its input."""

    def __init__(self, config: Config, attention: Attention):
        def norm() -> GemmaNorm:
            return GemmaNorm(config.hidden_size, config.rms_norm_eps)

        self.input_layernorm = norm()
        self.self_attn = attention
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.mlp = GatedMLP(config, config.hidden_activation)
        self.post_feedforward_layernorm = norm()

    def __call__(self, x: Float[Array, "B T H"], *positions: Array) -> Float[Array, "B T H"]:
        attended = self.self_attn(self.input_layernorm(x), *positions)
        x = x + self.post_attention_layernorm(attended)
        transformed = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(transformed)


class Gemma2Layer(GemmaLayer):
    def __init__(self, config: Config):
        attention = Attention(
            config,
            bias=config.attention_bias,
            output_bias=config.attention_bias,
            scale=config.query_pre_attn_scalar**-0.5,
            soft_cap=config.attn_logit_softcapping,
        )
        super().__init__(config, attention)


class GemmaHead(CausalHead):
    """Logits of the next token, bent into a range if the config gives one."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.soft_cap = config.final_logit_softcapping

    def __call__(self, outputs: Outputs) -> Float[Array, "B T V"]:
        logits = super().__call__(outputs)
        return logits if self.soft_cap is None else capped(logits, self.soft_cap)


FAMILY = decoder_family(
    Gemma2Layer,
    windows=windows_by_type,
    norm=GemmaNorm,
    embedding_scale=lambda config: config.hidden_size**0.5,
    head=GemmaHead,
)
