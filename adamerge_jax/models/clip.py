"""CLIP (Radford et al., 2021): the vision tower, which is merged, before a zero-shot head.

Experts are vision towers fine-tuned with the head frozen.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from adamerge_jax.models.clip_text import Encoder
from adamerge_jax.models.family import Family, LastLayer, attention_heads
from adamerge_jax.models.inputs import ImageGeometry
from adamerge_jax.models.layers import (
    Config,
    Embedding,
    LayerNorm,
    Linear,
    Outputs,
    PatchEmbedding,
    Rematerialize,
    parameter,
    value,
)
from adamerge_jax.models.zero_shot import ZeroShotHead


class VisionEmbeddings(nnx.Module):
    def __init__(self, config: Config):
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

    def __init__(self, config: Config, rematerialize: Rematerialize):
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = Encoder(config, rematerialize)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(
        self, pixels: Float[Array, "B channels height width"], hidden_states: bool
    ) -> Outputs:
        embedded = self.pre_layrnorm(self.embeddings(pixels))
        last, states = self.encoder.layers(embedded, hidden_states=hidden_states)
        return Outputs(self.post_layernorm(last[:, 0]), last, states)


class ClipVisionBackbone(nnx.Module):
    """The merged part of a `CLIPModel`: the vision tower and its projection.

    `pooled` is the projected image embedding `[B, D]`, not normalised.
    """

    def __init__(self, config: Config, rematerialize: Rematerialize):
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


FAMILY = Family(
    backbone=ClipVisionBackbone,
    head=ZeroShotHead,
    prefixes=("vision_model.",),
    inputs=("pixel_values",),
    max_tokens=lambda config: None,
    heads=attention_heads(
        "*.self_attn.q_proj.*",
        "*.self_attn.k_proj.*",
        "*.self_attn.v_proj.*",
        "*.self_attn.out_proj.weight",
        part="vision_config",
    ),
    auto_class=None,
    last_layer=LastLayer("text_embeddings", "bias", scaled_only=True),
    base_only=("visual_projection.*",),
    ignored_in_experts=("text_model.*", "text_projection.*", "logit_scale"),
)
