"""ViT (Dosovitskiy et al., 2021) for image classification, as `transformers` saves it.

The paths are the names in a saved checkpoint. Recent `transformers` classes have attributes with
other names, which are renamed to these on saving.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from adamerge_jax.models.bert import Intermediate
from adamerge_jax.models.family import Family, attention_heads
from adamerge_jax.models.inputs import ImageGeometry
from adamerge_jax.models.layers import (
    Config,
    LayerNorm,
    Linear,
    LinearHead,
    Outputs,
    PatchEmbedding,
    Prefixed,
    Rematerialize,
    Stack,
    attention,
    parameter,
    value,
)


class PatchEmbeddings(nnx.Module):
    def __init__(self, geometry: ImageGeometry, features: int):
        self.projection = PatchEmbedding(geometry.channels, features, geometry.patch, bias=True)


class Embeddings(nnx.Module):
    """The patches of an image behind tokens that are parameters, with positions."""

    def __init__(self, config: Config, tokens: Sequence[str] = ("cls_token",)):
        """Makes the parameters, among them one for each of these tokens, by this name."""
        self.geometry = ImageGeometry.of(config)
        self.tokens = tuple(tokens)
        for name in tokens:
            setattr(self, name, parameter(1, 1, config.hidden_size))
        positions = self.geometry.patches + len(tokens)
        self.position_embeddings = parameter(1, positions, config.hidden_size)
        self.patch_embeddings = PatchEmbeddings(self.geometry, config.hidden_size)

    def __call__(
        self, pixels: Float[Array, "B channels height width"]
    ) -> Float[Array, "B tokens+patches H"]:
        patches = self.patch_embeddings.projection(self.geometry.whole_patches(pixels))
        return self.behind_tokens(patches) + value(self.position_embeddings)

    def behind_tokens(
        self, patches: Float[Array, "B patches H"]
    ) -> Float[Array, "B tokens+patches H"]:
        """Puts the tokens before the patches of every image."""
        shape = (len(patches), 1, patches.shape[-1])
        tokens = [jnp.broadcast_to(value(getattr(self, name)), shape) for name in self.tokens]
        return jnp.concatenate([*tokens, patches], axis=1)


class SelfAttention(nnx.Module):
    def __init__(self, config: Config):
        width, bias = config.hidden_size, config.qkv_bias
        self.query = Linear(width, width, bias=bias)
        self.key = Linear(width, width, bias=bias)
        self.value = Linear(width, width, bias=bias)
        self.heads = config.num_attention_heads

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        return attention(self.query(x), self.key(x), self.value(x), self.heads)


class Projection(nnx.Module):
    """A linear layer back to the width of the residual stream."""

    def __init__(self, inputs: int, config: Config):
        self.dense = Linear(inputs, config.hidden_size)

    def __call__(self, x: Float[Array, "B T inputs"]) -> Float[Array, "B T H"]:
        return self.dense(x)


class Attention(nnx.Module):
    def __init__(self, config: Config):
        self.attention = SelfAttention(config)
        self.output = Projection(config.hidden_size, config)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        return self.output(self.attention(x))


class Layer(nnx.Module):
    def __init__(self, config: Config):
        self.layernorm_before = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config)
        self.layernorm_after = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.intermediate = Intermediate(config)
        self.output = Projection(config.intermediate_size, config)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.output(self.intermediate(self.layernorm_after(x)))


class Encoder(nnx.Module):
    def __init__(self, config: Config, rematerialize: Rematerialize):
        self.layer = Stack(lambda: Layer(config), config.num_hidden_layers, rematerialize)


class Vit(nnx.Module):
    """Embeddings, encoder and the last normalisation; the parameters under `vit.`."""

    def __init__(
        self,
        config: Config,
        rematerialize: Rematerialize,
        tokens: Sequence[str] = ("cls_token",),
    ):
        self.embeddings = Embeddings(config, tokens)
        self.encoder = Encoder(config, rematerialize)
        self.layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(
        self, inputs: Mapping[str, Float[Array, "B channels height width"]], hidden_states: bool
    ) -> Outputs:
        embedded = self.embeddings(inputs["pixel_values"])
        last, states = self.encoder.layer(embedded, hidden_states=hidden_states)
        last = self.layernorm(last)
        return Outputs(last[:, 0], last, states)


HEADS = attention_heads(
    "*.attention.attention.query.*",
    "*.attention.attention.key.*",
    "*.attention.attention.value.*",
    "*.attention.output.dense.weight",
)
"""The axis and number of attention heads in the parameters of `Attention`."""

RENAMED_ATTENTION = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)
"""Parts of names in `Attention`, and what stands for them in the model of `transformers`."""

FAMILY = Family(
    backbone=partial(Prefixed, "vit", Vit),
    head=LinearHead,
    prefixes=("vit.",),
    inputs=("pixel_values",),
    max_tokens=lambda config: None,
    heads=HEADS,
    auto_class="AutoModelForImageClassification",
    renamed=(
        ("encoder.layer.", "layers."),
        *RENAMED_ATTENTION,
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    ),
)
