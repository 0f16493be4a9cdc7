"""SigLIP (Zhai et al., 2023): the vision tower with a classifier of images.

Zero-shot heads, from names of classes by the text tower, are CLIP's alone here.
"""

from collections.abc import Mapping
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from adamerge_jax.errors import InputError
from adamerge_jax.models.clip_text import Encoder, FeedForward
from adamerge_jax.models.family import Family, attention_heads
from adamerge_jax.models.inputs import ImageGeometry
from adamerge_jax.models.layers import (
    Config,
    Embedding,
    LayerNorm,
    Linear,
    LinearHead,
    Outputs,
    PatchEmbedding,
    Prefixed,
    Rematerialize,
    parameter,
)


class Embeddings(nnx.Module):
    def __init__(self, config: Config):
        self.geometry = ImageGeometry.of(config)
        self.patch_embedding = PatchEmbedding(
            self.geometry.channels, config.hidden_size, self.geometry.patch, bias=True
        )
        self.position_embedding = Embedding(self.geometry.patches, config.hidden_size)

    def __call__(
        self, pixels: Float[Array, "B channels height width"]
    ) -> Float[Array, "B patches H"]:
        patches = self.patch_embedding(self.geometry.whole_patches(pixels))
        return patches + self.position_embedding(jnp.arange(self.geometry.patches))


class PoolingAttention(nnx.Module):
    """Attention with the projections to queries, keys and values below each other."""

    def __init__(self, config: Config):
        self.in_proj_weight = parameter(3 * config.hidden_size, config.hidden_size)
        self.in_proj_bias = parameter(3 * config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)


class PoolingHead(nnx.Module):
    """The parameters of the pooling before images are compared with texts.

    A classifier reads the mean of the patches in its place. Files have these parameters all the
    same, and a merge has them too.
    """

    def __init__(self, config: Config):
        self.probe = parameter(1, 1, config.hidden_size)
        self.attention = PoolingAttention(config)
        self.layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = FeedForward(config)


class VisionModel(nnx.Module):
    """The parameters under `vision_model.` in a checkpoint.

    `pooled`, `[B, H]`, is the mean of the states of the patches.
    """

    def __init__(self, config: Config, rematerialize: Rematerialize):
        vision = config.vision_config
        self.embeddings = Embeddings(vision)
        self.encoder = Encoder(vision, rematerialize)
        self.post_layernorm = LayerNorm(vision.hidden_size, vision.layer_norm_eps)
        if vision.vision_use_head:
            self.head = PoolingHead(vision)

    def __call__(
        self, inputs: Mapping[str, Float[Array, "B channels height width"]], hidden_states: bool
    ) -> Outputs:
        embedded = self.embeddings(inputs["pixel_values"])
        last, states = self.encoder.layers(embedded, hidden_states=hidden_states)
        last = self.post_layernorm(last)
        return Outputs(last.mean(axis=1), last, states)


def head(config: Config) -> LinearHead:
    """Returns the head of a task, whose classes are those of the whole config.

    Raises:
        InputError: The config is that of a tower alone, which has no classifier.
    """
    if not hasattr(config, "vision_config"):
        raise InputError(
            f"config.json: model_type {config.model_type!r} is one tower of a SigLIP, which gives "
            "no classes; coefficients are learned of experts with a classifier "
            "(SiglipForImageClassification), others can be merged without learning (adamerge "
            "merge, adamerge fold)"
        )
    return LinearHead(config.vision_config, config.num_labels)


FAMILY = Family(
    backbone=partial(Prefixed, "vision_model", VisionModel),
    head=head,
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
    auto_class="AutoModelForImageClassification",
)
