"""The arrays of a batch: optional ones are completed, sizes are checked against the config.

A batch that does not fit is refused when the model is traced, where shapes are known; otherwise the
model would read position embeddings that do not exist.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adamerge_jax.errors import InputError
from adamerge_jax.models.layers import Config


class TextInputs(NamedTuple):
    """A batch of token sequences, complete."""

    token_ids: Int[Array, "B T"]
    attention_mask: Int[Array, "B T"]
    token_types: Int[Array, "B T"]


def text_inputs(inputs: Mapping[str, Int[Array, "B T"]], longest: int) -> TextInputs:
    """Completes a batch of text: without a mask nothing is padding, without types all are 0.

    Args:
        inputs: `input_ids`, and optionally `attention_mask` and `token_type_ids`.
        longest: The number of tokens that the model has positions for.

    Raises:
        InputError: The sequences are longer than that.
    """
    token_ids = inputs["input_ids"]
    if token_ids.shape[1] > longest:
        raise InputError(
            f"input_ids: sequences have {token_ids.shape[1]} tokens, the model has positions for "
            f"{longest}; truncate them to {longest}"
        )
    return TextInputs(
        token_ids,
        inputs.get("attention_mask", jnp.ones_like(token_ids)),
        inputs.get("token_type_ids", jnp.zeros_like(token_ids)),
    )


@dataclasses.dataclass(frozen=True)
class ImageGeometry:
    """The images that a model reads, and the patches that it cuts them into.

    Attributes:
        channels: Colour channels.
        height: In pixels.
        width: In pixels.
        patch: The side of a square patch, in pixels.
    """

    channels: int
    height: int
    width: int
    patch: int

    @classmethod
    def of(cls, config: Config) -> "ImageGeometry":
        """Reads the geometry of a vision config.

        Raises:
            InputError: The patches are not square.
        """
        patch, patch_width = _pair(config.patch_size)
        if patch != patch_width:
            raise InputError(
                f"config.json: patch_size is {patch} x {patch_width}; only square patches are "
                "supported"
            )
        return cls(config.num_channels, *_pair(config.image_size), patch)

    @property
    def patches(self) -> int:
        """The number of whole patches in an image."""
        return (self.height // self.patch) * (self.width // self.patch)

    def of_images(self, pixels: Float[Array, "B channels height width"]) -> "ImageGeometry":
        """Returns the geometry of images of another size.

        Raises:
            InputError: The images are smaller than a patch.
        """
        height, width = pixels.shape[2:]
        if min(height, width) < self.patch:
            raise InputError(
                f"pixel_values: images have {height} x {width} pixels, less than a patch of the "
                f"model, {self.patch} x {self.patch}"
            )
        return dataclasses.replace(self, height=height, width=width)

    def whole_patches(
        self, pixels: Float[Array, "B channels height width"]
    ) -> Float[Array, "B channels rows*patch columns*patch"]:
        """Checks the images' size and cuts off the pixels that fill no whole patch.

        Raises:
            InputError: The images have another size or number of channels.
        """
        expected = (self.channels, self.height, self.width)
        if pixels.shape[1:] != expected:
            raise InputError(
                f"pixel_values: images have (channels, height, width) {pixels.shape[1:]}, the "
                f"model expects {expected}; prepare them with the model's image processor"
            )
        height, width = (side - side % self.patch for side in (self.height, self.width))
        return pixels[:, :, :height, :width]


def stated_image_shape(config: Config) -> tuple[int, int, int] | None:
    """Returns channels, height and width of a model's images; None if its config does not say.

    Args:
        config: The config of the model, or of one with a tower for images.
    """
    vision = getattr(config, "vision_config", None) or config
    names = ("image_size", "input_size")
    size = next((getattr(vision, name) for name in names if hasattr(vision, name)), None)
    if isinstance(size, Mapping):
        size = (size["height"], size["width"])
    if not size:
        return None
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return getattr(vision, "num_channels", 3), height, width


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Returns height and width from a config's size, one number where both are the same."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
