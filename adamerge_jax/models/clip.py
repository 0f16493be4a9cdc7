"""CLIP (Radford et al., 2021): the vision tower, the text tower, the zero-shot head.

Experts are vision towers fine-tuned with the head frozen. A task's head is made once, from its
class names, by the base's text tower (`adamerge_jax.models.zero_shot`).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

from adamerge_jax.models.inputs import ImageGeometry, text_inputs
from adamerge_jax.models.layers import (
    Embedding,
    LayerNorm,
    Linear,
    Outputs,
    PatchEmbedding,
    Rematerialize,
    Stack,
    activation_of,
    attention,
    causal_bias,
    padding_bias,
    parameter,
    value,
)

LEGACY_END_OF_TEXT = 2
"""What `eos_token_id` wrongly says in configs of the first CLIP checkpoints."""


def normalise(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """The vectors along the last axis at length 1, in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.square(wide).sum(-1, keepdims=True))


class SelfAttention(nnx.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig):
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
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig):
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)
        self.activation = activation_of(config.hidden_act)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nnx.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig):
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
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, rematerialize: Rematerialize):
        self.layers = Stack(lambda: Layer(config), config.num_hidden_layers, rematerialize)


class VisionEmbeddings(nnx.Module):
    def __init__(self, config: CLIPVisionConfig):
        self.geometry = ImageGeometry.of(config)
        self.class_embedding = parameter(config.hidden_size)
        self.patch_embedding = PatchEmbedding(
            self.geometry.channels, config.hidden_size, self.geometry.patch, bias=False
        )
        self.position_embedding = Embedding(self.geometry.patches + 1, config.hidden_size)

    def __call__(
        self, pixels: Float[Array, "B channels height width"]
    ) -> Float[Array, "B patches+1 H"]:
        patches = self.patch_embedding(self.geometry.whole_patches(pixels))
        batch, count, features = patches.shape
        first = jnp.broadcast_to(value(self.class_embedding), (batch, 1, features))
        embedded = jnp.concatenate([first, patches], axis=1)
        return embedded + self.position_embedding(jnp.arange(count + 1))


class VisionModel(nnx.Module):
    """The parameters under `vision_model.` in a checkpoint."""

    def __init__(self, config: CLIPVisionConfig, rematerialize: Rematerialize):
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = Encoder(config, rematerialize)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(
        self, pixels: Float[Array, "B channels height width"], hidden_states: bool
    ) -> Outputs:
        embedded = self.pre_layrnorm(self.embeddings(pixels))
        last, every = self.encoder.layers(embedded, hidden_states=hidden_states)
        return Outputs(self.post_layernorm(last[:, 0]), last, every)


class ClipVisionBackbone(nnx.Module):
    """What is merged in a `CLIPModel`: the vision tower and its projection.

    `pooled` is the projected image embedding `[B, D]`, not normalised.
    """

    def __init__(self, config: CLIPConfig, rematerialize: Rematerialize):
        self.vision_model = VisionModel(config.vision_config, rematerialize)
        self.visual_projection = Linear(
            config.vision_config.hidden_size, config.projection_dim, bias=False
        )

    def __call__(
        self,
        inputs: Mapping[str, Float[Array, "B channels height width"]],
        hidden_states: bool = False,
    ) -> Outputs:
        outputs = self.vision_model(inputs["pixel_values"], hidden_states)
        return outputs._replace(pooled=self.visual_projection(outputs.pooled))


class ZeroShotHead(nnx.Module):
    """Scaled cosine similarity of an image to each class name.

    `logits = exp(logit_scale) * normalise(pooled) @ text_embeddings.T`

    `text_embeddings`, `[C, D]`, have length 1. No checkpoint holds them: `zero_shot_head` makes
    them, and C is `config.num_labels` only in the shapes that are declared here.
    """

    def __init__(self, config: CLIPConfig):
        self.text_embeddings = parameter(config.num_labels, config.projection_dim)
        self.logit_scale = parameter()

    def __call__(self, outputs: Outputs) -> Float[Array, "B C"]:
        similarity = normalise(outputs.pooled) @ value(self.text_embeddings).T
        return jnp.exp(value(self.logit_scale)) * similarity


class TextEmbeddings(nnx.Module):
    def __init__(self, config: CLIPTextConfig):
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size)

    def __call__(self, token_ids: Int[Array, "B T"]) -> Float[Array, "B T H"]:
        positions = jnp.arange(token_ids.shape[1])
        return self.token_embedding(token_ids) + self.position_embedding(positions)


class TextModel(nnx.Module):
    """The parameters under `text_model.` in a checkpoint."""

    def __init__(self, config: CLIPTextConfig):
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
    """What a zero-shot head is made of: all of a `CLIPModel` that `ClipVisionBackbone` is not.

    Called with a batch of token sequences, it returns their embeddings `[B, D]`, not normalised:
    the projected state of each sequence's end-of-text token.
    """

    def __init__(self, config: CLIPConfig):
        self.text_model = TextModel(config.text_config)
        self.text_projection = Linear(
            config.text_config.hidden_size, config.projection_dim, bias=False
        )
        self.logit_scale = parameter()

    def __call__(self, inputs: Mapping[str, Int[Array, "B T"]]) -> Float[Array, "B D"]:
        return self.text_projection(self.text_model(inputs))
