"""DINOv2 (Oquab et al., 2023) for image classification, also with registers (Darcet et al., 2023).

Images may have another size than the config states, whose positions are then resized to theirs.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from adamerge_jax.errors import InputError
from adamerge_jax.models import vit
from adamerge_jax.models.clip_text import FeedForward
from adamerge_jax.models.family import Family
from adamerge_jax.models.inputs import ImageGeometry
from adamerge_jax.models.layers import (
    Config,
    LayerNorm,
    Linear,
    LinearHead,
    Outputs,
    Prefixed,
    Rematerialize,
    Stack,
    parameter,
    value,
)
from adamerge_jax.models.resizing import cubic, resizer

_WITH_REGISTERS = "dinov2_with_registers"

_MOST = 2**31
"""More entries than an axis of an array has."""

_RESIZE = resizer(cubic, antialias=False)
_RESIZE_SMOOTHLY = resizer(cubic, antialias=True)


class Embeddings(vit.Embeddings):
    """Those of a ViT, with positions resized to the image, and registers that have none."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.side = math.isqrt(self.geometry.patches)
        if self.side**2 != self.geometry.patches:
            raise InputError(
                f"config.json: image_size {config.image_size} and patch_size {config.patch_size} "
                f"make {self.geometry.patches} patches; expected a square number, as the positions "
                "of a DINOv2 lie in a square"
            )
        self.has_registers = config.model_type == _WITH_REGISTERS
        # Not read here, but a part of the files.
        if self.has_registers or config.use_mask_token:
            self.mask_token = parameter(1, config.hidden_size)
        if self.has_registers:
            self.register_tokens = parameter(1, config.num_register_tokens, config.hidden_size)

    def __call__(
        self, pixels: Float[Array, "B channels height width"]
    ) -> Float[Array, "B tokens+patches H"]:
        images = self.geometry.of_images(pixels)
        patches = self.patch_embeddings.projection(images.whole_patches(pixels))
        embedded = self.behind_tokens(patches) + self.positions(images)
        if not self.has_registers:
            return embedded
        registers = value(self.register_tokens)
        registers = jnp.broadcast_to(registers, (len(patches), *registers.shape[1:]))
        return jnp.concatenate([embedded[:, :1], registers, embedded[:, 1:]], axis=1)

    def positions(self, images: ImageGeometry) -> Float[Array, "1 1+patches H"]:
        """Returns the positions of the first token and of the patches of images."""
        positions = value(self.position_embeddings)
        if images.patches == self.geometry.patches and images.height == images.width:
            return positions
        rows, columns = images.height // images.patch, images.width // images.patch
        grid = positions[0, 1:].astype(jnp.float32).T.reshape(-1, self.side, self.side)
        # As in `transformers`, which smooths for models with registers alone.
        resize = _RESIZE_SMOOTHLY if self.has_registers else _RESIZE
        grid = resize(grid, (rows, columns), False).reshape(-1, rows * columns).T
        return jnp.concatenate([positions[:, :1], grid[None].astype(positions.dtype)], axis=1)


class LayerScale(nnx.Module):
    def __init__(self, config: Config):
        self.lambda1 = parameter(config.hidden_size)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        return x * value(self.lambda1)


class GatedFeedForward(nnx.Module):
    """SwiGLU: the first half of `weights_in` is the gate of the second."""

    def __init__(self, config: Config, features: int):
        # About as many parameters as without a gate, in a multiple of 8.
        features = (int(features * 2 / 3) + 7) // 8 * 8
        self.weights_in = Linear(config.hidden_size, 2 * features)
        self.weights_out = Linear(features, config.hidden_size)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        gate, values = jnp.split(self.weights_in(x), 2, axis=-1)
        return self.weights_out(jax.nn.silu(gate) * values)


class Layer(nnx.Module):
    def __init__(self, config: Config):
        features = int(config.hidden_size * config.mlp_ratio)
        if not 0 < features < _MOST:
            raise InputError(
                f"config.json: mlp_ratio is {config.mlp_ratio}, hidden_size {config.hidden_size}; "
                "expected a product above 0 and below 2**31"
            )
        feed_forward = GatedFeedForward if config.use_swiglu_ffn else FeedForward
        self.norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = vit.Attention(config)
        self.layer_scale1 = LayerScale(config)
        self.norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = feed_forward(config, features)
        self.layer_scale2 = LayerScale(config)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class Encoder(nnx.Module):
    def __init__(self, config: Config, rematerialize: Rematerialize):
        self.layer = Stack(lambda: Layer(config), config.num_hidden_layers, rematerialize)


class Dinov2(nnx.Module):
    """Embeddings, encoder and the last normalisation.

    `pooled`, `[B, 2 H]`, is the state of the first token beside the mean of those of the patches.
    """

    def __init__(self, config: Config, rematerialize: Rematerialize):
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, rematerialize)
        self.layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.before_patches = 1 + getattr(config, "num_register_tokens", 0)

    def __call__(
        self, inputs: Mapping[str, Float[Array, "B channels height width"]], hidden_states: bool
    ) -> Outputs:
        embedded = self.embeddings(inputs["pixel_values"])
        last, states = self.encoder.layer(embedded, hidden_states=hidden_states)
        last = self.layernorm(last)
        pooled = jnp.concatenate([last[:, 0], last[:, self.before_patches :].mean(axis=1)], axis=-1)
        return Outputs(pooled, last, states)


def backbone(config: Config, rematerialize: Rematerialize) -> nnx.Module:
    """Returns the backbone, whose parameters begin with the type of the model."""
    return Prefixed(config.model_type, Dinov2, config, rematerialize)


class Classifier(LinearHead):
    def __init__(self, config: Config):
        self.classifier = Linear(2 * config.hidden_size, config.num_labels)


FAMILY = Family(
    backbone=backbone,
    head=Classifier,
    prefixes=("dinov2.", f"{_WITH_REGISTERS}."),
    inputs=("pixel_values",),
    max_tokens=lambda config: None,
    heads=vit.HEADS,
    auto_class="AutoModelForImageClassification",
    reads_any_size=True,
    renamed=(*vit.RENAMED_ATTENTION, ("mlp.weights_out", "mlp.down_proj")),
)
