"""The text tower of CLIP (Radford et al., 2021), and the transformer layers of both towers."""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from adamerge_jax.models.inputs import text_inputs
from adamerge_jax.models.layers import (
    Config,
    Embedding,
    LayerNorm,
    Linear,
    Rematerialize,
    Stack,
    activation_of,
    attention,
    causal_bias,
    padding_bias,
    parameter,
)

LEGACY_END_OF_TEXT = 2
"""The wrong `eos_token_id` in configs of the first CLIP checkpoints."""


class SelfAttention(nnx.Module):
    def __init__(self, config: Config):
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, config.hidden_size)
        self.v_proj = Linear(config.hidden_size, config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)
        self.heads = config.num_attention_heads

    def __call__(
        self, x: Float[Array, "B T H"], bias: Float[Array, "B 1 T T"] | None
    ) -> Float[Array, "B T H"]:
        mixed = attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, bias)
        return self.out_proj(mixed)


class FeedForward(nnx.Module):
    def __init__(self, config: Config, features: int | None = None):
        """Makes the layers, with so many features between them in place of `intermediate_size`."""
        inner: int = features or config.intermediate_size
        self.fc1 = Linear(config.hidden_size, inner)
        self.fc2 = Linear(inner, config.hidden_size)
        self.activation = activation_of(config.hidden_act)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nnx.Module):
    def __init__(self, config: Config):
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = FeedForward(config)

    def __call__(
        self, x: Float[Array, "B T H"], bias: Float[Array, "B 1 T T"] | None = None
    ) -> Float[Array, "B T H"]:
        x = x + self.self_attn(self.layer_norm1(x), bias)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    def __init__(self, config: Config, rematerialize: Rematerialize):
        self.layers = Stack(lambda: Layer(config), config.num_hidden_layers, rematerialize)


class TextEmbeddings(nnx.Module):
    def __init__(self, config: Config):
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size)

    def __call__(self, token_ids: Int[Array, "B T"]) -> Float[Array, "B T H"]:
        positions = jnp.arange(token_ids.shape[1])
        return self.token_embedding(token_ids) + self.position_embedding(positions)


class TextModel(nnx.Module):
    """The parameters under `text_model.` in a checkpoint."""

    def __init__(self, config: Config):
        self.embeddings = TextEmbeddings(config)
        # Nothing is differentiated through the text tower, so nothing is kept for that.
        self.encoder = Encoder(config, "nothing")
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.end_of_text = config.eos_token_id
        self.longest = config.max_position_embeddings

    def __call__(self, inputs: Mapping[str, Int[Array, "B T"]]) -> Float[Array, "B H"]:
        token_ids, mask, _ = text_inputs(inputs, self.longest)
        # The smaller of the two rather than their sum, which would be minus infinity.
        bias = jnp.minimum(causal_bias(token_ids.shape[1]), padding_bias(mask))
        last, _ = self.encoder.layers(self.embeddings(token_ids), bias)
        if self.end_of_text == LEGACY_END_OF_TEXT:
            end = token_ids.argmax(axis=1)
        else:
            end = (token_ids == self.end_of_text).argmax(axis=1)
        return self.final_layer_norm(last[jnp.arange(len(end)), end])


class ClipText(nnx.Module):
    """The source of zero-shot heads: all of a `CLIPModel` that `ClipVisionBackbone` is not.

    Called with a batch of token sequences, it returns their embeddings `[B, D]`, not normalised:
    the projected state of each sequence's end-of-text token.
    """

    def __init__(self, config: Config):
        self.text_model = TextModel(config.text_config)
        self.text_projection = Linear(
            config.text_config.hidden_size, config.projection_dim, bias=False
        )
        self.logit_scale = parameter()

    def __call__(self, inputs: Mapping[str, Int[Array, "B T"]]) -> Float[Array, "B D"]:
        return self.text_projection(self.text_model(inputs))
