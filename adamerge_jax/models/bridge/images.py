"""The images among a language model's tokens, as arguments of its PyTorch forward."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Array, Int
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from adamerge_jax.errors import InputError
from adamerge_jax.models.bridge.torch_in_jax import torch_in_jax
from adamerge_jax.models.images_in_text import COUNT, PIXELS, Grid
from adamerge_jax.models.inputs import stated_image_shape

TOKENS = ("input_ids", "attention_mask")
"""The arrays of a batch that are of its tokens alone."""

_GRIDS = "image_grid_thw"
"""The argument that tells the grid of each image's patches."""


@dataclasses.dataclass
class ImageFeatures(ModelOutput):
    """The features of images, as models take them from their `get_image_features`.

    Attributes:
        pooler_output: The features that stand at the images' tokens.
        deepstack_features: Those that are added to the states of the first layers there.
    """

    pooler_output: Any = None
    deepstack_features: Any = None


class TorchImages:
    """The images of a model's conversations.

    Attributes:
        token: The token that stands for a piece of an image.
    """

    def __init__(self, model: PreTrainedModel):
        """Finds the token of images.

        Args:
            model: A model without values.

        Raises:
            InputError: The config does not say which token stands for images, or the model is an
                encoder-decoder, which reads no conversations.
        """
        if model.config.is_encoder_decoder:
            raise InputError(
                "config.json: is_encoder_decoder is true; such models learn from prompts and "
                "responses, without images"
            )
        self._body = model.base_model
        self._config = model.config
        token = getattr(model.config, "image_token_id", None)
        if not isinstance(token, int):
            raise InputError(
                f"config.json: image_token_id is {token!r}; expected the token that stands for an "
                "image, without which conversations with images cannot be learned from"
            )
        self.token = token
        self._reads = inspect.signature(type(self._body).forward).parameters

    def positions(self, tokens: Sequence[int], grid: Grid | None) -> Int[np.ndarray, "3 T"] | None:
        """Returns the positions of a conversation's tokens; None if they are 0, 1, 2, ..."""
        if not hasattr(self._body, "get_rope_index"):
            return None
        ids = torch.tensor([tokens])
        is_image = (ids == self.token).int()
        # More grids than images are harmless: they are taken one by one.
        grids = None if grid is None else torch.tensor([grid]).repeat(len(tokens), 1)
        positions, _ = self._body.get_rope_index(
            ids, mm_token_type_ids=is_image, image_grid_thw=grids
        )
        return positions[:, 0].numpy().astype(np.int32)

    def arguments(self, inputs: Mapping[str, Array]) -> dict[str, Any]:
        """Returns the arguments of `forward`.

        Args:
            inputs: A batch, see `models/images_in_text.py`.
        """
        arguments: dict[str, Any] = {name: inputs[name] for name in TOKENS if name in inputs}
        if "position_ids" in inputs:
            arguments["position_ids"] = jnp.moveaxis(inputs["position_ids"], 1, 0)
        if "token_type_ids" in self._reads:
            arguments["token_type_ids"] = (inputs["input_ids"] == self.token).astype(jnp.int32)
        if PIXELS in inputs:
            arguments[PIXELS] = _packed(inputs[PIXELS], inputs[COUNT])
        return arguments

    def forward(self, body: torch.nn.Module) -> Callable[..., Any]:
        """Returns a model's forward, in which each image is read alone, all in parallel.

        Many models read images one after the other, as theirs have grids of their own; the
        compiled function would be as long as the images are many.

        Args:
            body: The model, of the class of the one given on creation.
        """

        def run(**arguments: Any) -> Any:
            if PIXELS not in arguments:
                return body.forward(**arguments)
            images = arguments[PIXELS].jax()
            read_images = partial(_read_each, _reader_of(body), images)
            replacements = {(body, "get_image_features"): read_images}
            text = getattr(body, "language_model", None)
            if hasattr(text, "_deepstack_process"):
                replacements[text, "_deepstack_process"] = _add_to_images
            for (module, name), function in replacements.items():
                setattr(module, name, function)
            try:
                return body.forward(**arguments)
            finally:
                for module, name in replacements:
                    delattr(module, name)

        return run

    def example(self, size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a batch of conversations with an image each."""
        vision = getattr(self._config, "vision_config", self._config)
        shapes: dict[str, tuple[int, ...]] = {name: (size, length) for name in TOKENS}
        shapes[COUNT] = (size,)
        if _GRIDS in self._reads:
            side = 2 * vision.spatial_merge_size
            channels = getattr(vision, "in_channels", 3)
            patch = channels * vision.temporal_patch_size * vision.patch_size**2
            if hasattr(self._body, "get_rope_index"):
                shapes["position_ids"] = (size, 3, length)
            pixels: tuple[int, ...] = (size, 1, 1, side, side, patch)
        else:
            channels = getattr(vision, "num_channels", 3)
            pixels = (size, 1, *(stated_image_shape(vision) or (channels, 224, 224)))
        example = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
        return {**example, PIXELS: jax.ShapeDtypeStruct(pixels, jnp.float32)}


def _reader_of(body: torch.nn.Module) -> Callable[..., Any]:
    """Returns the function by which a model reads images."""
    if not hasattr(body, "connector"):
        return body.get_image_features

    def read_square(images: torch.Tensor, **_: Any) -> ImageFeatures:
        """Reads images of an Idefics 3, which looks for those that are padding by their values."""
        sides = [side // body.config.vision_config.patch_size for side in images.shape[-2:]]
        is_image = torch.ones((len(images), *sides), dtype=torch.bool)
        states = body.vision_model(pixel_values=images, patch_attention_mask=is_image)
        return ImageFeatures(pooler_output=[body.connector(states.last_hidden_state)])

    return read_square


def _read_each(read: Callable[..., Any], images: Array, *_: Any, **options: Any) -> ImageFeatures:
    """Reads images, each alone, in place of a model's `get_image_features`.

    Args:
        read: The model's own function.
        images: The images, `[images, channels, height, width]` or `[images, t, h, w, F]`.
        *_: All images once more, as the model gives them.
        **options: The model's other options.
    """
    environment = torch_in_jax()
    options = {name: value for name, value in options.items() if name not in (PIXELS, _GRIDS)}
    in_pieces = False

    def read_one(image: Array) -> tuple[Array, list[Array]]:
        nonlocal in_pieces
        grid = {}
        if image.ndim == 4:
            # A plain tensor, whose values are known while the function is compiled.
            grid = {_GRIDS: torch.tensor([image.shape[:3]])}
            pixels = image.reshape(-1, image.shape[-1])
        else:
            pixels = image[None]
        result = read(environment.j2t_iso(pixels), **grid, **options)
        in_pieces = isinstance(result.pooler_output, list | tuple)
        further = getattr(result, "deepstack_features", None) or ()
        return _joined(result.pooler_output), [_joined(features) for features in further]

    features, further = environment.j2t_iso(jax.vmap(read_one)(images))
    return ImageFeatures(
        pooler_output=[features.flatten(0, 1)] if in_pieces else features,
        deepstack_features=[[layer.flatten(0, 1)] for layer in further],
    )


def _joined(features: Any) -> Array:
    """Returns the features of an image, `[tokens, H]`, which may be in pieces."""
    pieces = features if isinstance(features, list | tuple) else [features]
    return jnp.concatenate([piece.jax().reshape(-1, piece.shape[-1]) for piece in pieces])


def _add_to_images(
    states: torch.Tensor, is_image: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """Adds features to the states of tokens that stand for images, whose number is not known."""
    places = is_image[..., None].expand(states.shape)
    return states + torch.zeros_like(states).masked_scatter(places, features.to(states.dtype))


def _packed(images: Array, counts: Int[Array, " B"]) -> Array:
    """Returns all images `[B * I, ...]`, those of conversations first and padding behind them.

    Models put the features of images into the places of their tokens in this order.
    """
    size, most = images.shape[:2]
    is_padding = jnp.arange(most) >= counts[:, None]
    order = jnp.argsort(is_padding.ravel(), stable=True)
    return images.reshape(size * most, *images.shape[2:])[order]
