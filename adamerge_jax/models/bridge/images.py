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
from adamerge_jax.models.images_in_text import COUNT, PIXELS, SIZES, Grid
from adamerge_jax.models.inputs import stated_image_shape

TOKENS = ("input_ids", "attention_mask")
"""The arrays of a batch that are of its tokens alone."""

_GRIDS = "image_grid_thw"
"""The argument that tells the grid of each image's patches."""

_PLACES = "image_position_ids"
"""The argument that tells the column and the row of each patch, of models without `_GRIDS`."""

_NUMBERS = "batch_num_images"
"""The argument that tells the number of each text's images; only one alone is cut into tiles."""

_TYPES_OF_TOKENS = ("token_type_ids", "mm_token_type_ids")
"""Arguments that are 1 for tokens of images, by which some models see all of an image at once."""


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
        for name in _TYPES_OF_TOKENS:
            if name in self._reads and "position_ids" not in inputs:
                arguments[name] = (inputs["input_ids"] == self.token).astype(jnp.int32)
        if PIXELS in inputs:
            arguments[PIXELS] = _packed(inputs[PIXELS], inputs[COUNT])
        if SIZES in inputs:
            arguments[SIZES] = inputs[SIZES]
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
            sizes = arguments.pop(SIZES, None)
            tiled_size = None if sizes is None else tuple(sizes.shape[-2:])
            images = arguments[PIXELS].jax()
            read_images = partial(_read_each, _reader_of(body), images, tiled_size)
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
        shapes: dict[str, tuple[int, ...]] = {name: (size, length) for name in TOKENS}
        shapes[COUNT] = (size,)
        if hasattr(self._body, "get_rope_index"):
            shapes["position_ids"] = (size, 3, length)
        example = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
        for name, shape in self._image_shapes().items():
            example[name] = jax.ShapeDtypeStruct((size, *shape), jnp.float32)
        return example

    def _image_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the arrays of one small image, without the axis of texts."""
        vision = getattr(self._config, "vision_config", self._config)
        if _GRIDS in self._reads:
            side = 2 * vision.spatial_merge_size
            channels = getattr(vision, "in_channels", 3)
            patch = channels * vision.temporal_patch_size * vision.patch_size**2
            return {PIXELS: (1, 1, side, side, patch)}
        if _PLACES in self._reads:
            side = 2 * vision.pooling_kernel_size
            return {PIXELS: (1, 1, side, side, 3 * vision.patch_size**2)}
        channels = getattr(vision, "num_channels", 3)
        pixels = stated_image_shape(vision) or (channels, 224, 224)
        if SIZES in self._reads and hasattr(self._config, "image_grid_pinpoints"):
            _, height, width = pixels
            whole = tuple(self._config.image_grid_pinpoints[0])
            tiles = 1 + (whole[0] // height) * (whole[1] // width)
            return {PIXELS: (1, tiles, *pixels), SIZES: (0, *whole)}
        return {PIXELS: (1, *pixels)}


def _reader_of(body: torch.nn.Module) -> Callable[..., Any]:
    """Returns the function by which a model reads images."""
    if not hasattr(body, "connector"):
        return body.get_image_features

    def read_square(images: torch.Tensor, **_: Any) -> ImageFeatures:
        """Reads images of an Idefics, which looks for those that are padding by their values."""
        sides = [side // body.config.vision_config.patch_size for side in images.shape[-2:]]
        is_image = torch.ones((len(images), *sides), dtype=torch.bool)
        states = body.vision_model(pixel_values=images, patch_attention_mask=is_image)
        masks = {}
        if "attention_mask" in inspect.signature(body.connector.forward).parameters:
            masks["attention_mask"] = is_image.flatten(1)
        return ImageFeatures(pooler_output=[body.connector(states.last_hidden_state, **masks)])

    return read_square


def _read_each(
    read: Callable[..., Any],
    images: Array,
    tiled_size: tuple[int, int] | None,
    *_: Any,
    **options: Any,
) -> ImageFeatures:
    """Reads images, each alone, in place of a model's `get_image_features`.

    Args:
        read: The model's own function.
        images: The images, `[images, ...]`, as in `models/images_in_text.py`.
        tiled_size: The height and width of an image before it was cut into tiles; None if images
            are not cut.
        *_: All images once more, as the model gives them.
        **options: The model's other options.
    """
    environment = torch_in_jax()
    parameters = inspect.signature(read).parameters
    # They are given here, for one image.
    of_all = {PIXELS, SIZES, _GRIDS, _PLACES, _NUMBERS}
    options = {name: value for name, value in options.items() if name not in of_all}
    in_pieces = False

    def read_one(image: Array) -> tuple[Array, list[Array]]:
        nonlocal in_pieces
        pixels, known = _with_geometry(image, tiled_size, parameters)
        result = read(environment.j2t_iso(pixels), **known, **options)
        in_pieces = isinstance(result.pooler_output, list | tuple)
        further = getattr(result, "deepstack_features", None) or ()
        return _joined(result.pooler_output), [_joined(features) for features in further]

    features, further = environment.j2t_iso(jax.vmap(read_one)(images))
    return ImageFeatures(
        pooler_output=[features.flatten(0, 1)] if in_pieces else features,
        deepstack_features=[[layer.flatten(0, 1)] for layer in further],
    )


def _with_geometry(
    image: Array,
    tiled_size: tuple[int, int] | None,
    parameters: Mapping[str, inspect.Parameter],
) -> tuple[Array, dict[str, torch.Tensor]]:
    """Returns an image as a model reads it, and what tells its grid or size.

    Args:
        image: The image, as in `models/images_in_text.py`.
        tiled_size: Its height and width before it was cut into tiles; None if it is whole.
        parameters: The parameters of the function that reads it.

    Returns:
        The pixels, with an axis of images in front where the model has one; plain tensors, whose
        values are known while the function is compiled.
    """
    known = {}
    if tiled_size is not None:
        known[SIZES] = torch.tensor([tiled_size])
        if _NUMBERS in parameters and len(image) == 1:
            # It was left whole, as one of several of its text.
            known[_NUMBERS] = torch.tensor([2])
        return image[None], known
    if image.ndim == 3:
        # A LLaVA needs no size, and may have a vision tower that takes none.
        if SIZES in parameters and parameters[SIZES].default is inspect.Parameter.empty:
            known[SIZES] = torch.tensor([image.shape[1:]])
        return image[None], known
    _, rows, columns, features = image.shape
    if _PLACES in parameters:
        row, column = np.divmod(np.arange(rows * columns), columns)
        places = torch.tensor(np.stack([column, row], axis=1))[None]
        return image.reshape(1, -1, features), {_PLACES: places}
    return image.reshape(-1, features), {_GRIDS: torch.tensor([image.shape[:3]])}


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
