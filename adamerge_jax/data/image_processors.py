"""The image processor of a checkpoint: read, checked field by field, and tried on an image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from adamerge_jax.data.images import ImageProcessor
from adamerge_jax.errors import InputError, in_one_line
from adamerge_jax.files.json_object import read_object

PROCESSOR_FILE = "preprocessor_config.json"

_LARGEST_SIDE = 2**14
"""Pixels of the largest side: a batch of such images fills any memory."""

_LARGEST_AREA = 2**25
"""Pixels of the largest image."""

_TRIED = ((48, 64), (64, 48))
"""Height and width of the images that a processor is tried on."""


def load_image_processor(folder: Path, where: str, shape: tuple[int, int, int]) -> ImageProcessor:
    """Loads a checkpoint's image processor.

    Args:
        folder: The checkpoint's folder.
        where: The checkpoint in error messages.
        shape: Channels, height and width of the images that the model takes.

    Raises:
        InputError: A field is impossible, or images come out in another shape than the model takes.
    """
    # Importing it takes a second or more, which only images are to cost.
    from PIL import Image
    from transformers import AutoImageProcessor

    try:
        fields = read_object(folder / PROCESSOR_FILE)
        require_fields(fields, shape[0])
        processor = ImageProcessor(
            AutoImageProcessor.from_pretrained(folder, trust_remote_code=False), shape
        )
        mode = processor.mode
    except InputError as error:
        raise InputError(f"{where}: its {PROCESSOR_FILE}: {error}") from error
    # The processors' own checks raise errors of many types.
    except Exception as error:
        raise InputError(
            f"{where}: its {PROCESSOR_FILE} cannot be read: {in_one_line(error)}; save it again "
            "with image_processor.save_pretrained(folder)"
        ) from error
    made = []
    for height, width in _TRIED:
        ramp = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
        image = Image.fromarray(ramp).convert(mode)
        try:
            with np.errstate(all="ignore"):
                inputs = processor.preprocess(images=[image], return_tensors="np")
            made.append(np.asarray(inputs["pixel_values"][0]))
        except Exception as error:
            raise InputError(
                f"{where}: the image processor of its {PROCESSOR_FILE} fails on an image: "
                f"{in_one_line(error)}"
            ) from error
    if not all(np.isfinite(pixels).all() for pixels in made):
        raise InputError(
            f"{where}: the image processor of its {PROCESSOR_FILE} makes NaN or infinity"
        )
    shapes = {pixels.shape for pixels in made}
    # Where the shape is the image's, each image is checked when it is read.
    channels = {made_shape[0] for made_shape in shapes}
    if channels != {shape[0]} or (len(shapes) == 1 and shapes != {shape}):
        raise InputError(
            f"{where}: its {PROCESSOR_FILE} makes images of (channels, height, width) "
            f"{shapes.pop()}, the model takes {shape}; set size (and crop_size) to the model's "
            "image_size"
        )
    return processor


def require_fields(fields: Any, channels: int, *, by_area: bool = False) -> None:
    """Refuses impossible values, by the name of their field.

    Args:
        fields: The fields of an image processor.
        channels: The model's channels.
        by_area: True for a processor whose sizes are numbers of pixels, not of those of a side.

    Raises:
        InputError: A value is impossible.
    """
    if not isinstance(fields, Mapping):
        raise InputError("holds no object")
    for name in ("image_mean", "image_std"):
        values = fields.get(name)
        if values is None:
            continue
        numbers = values if isinstance(values, list) else [values]
        if not all(_is_finite(number) for number in numbers) or (
            isinstance(values, list) and len(values) != channels
        ):
            raise InputError(
                f"{name} is {values!r:.80}; expected a number for each of the model's {channels} "
                "channels"
            )
        if name == "image_std" and not all(number > 0 for number in numbers):
            raise InputError(f"{name} is {values!r:.80}; expected numbers above 0")
    areas = dict.fromkeys(("min_pixels", "max_pixels"), _LARGEST_AREA)
    sides_of = dict.fromkeys(("size", "crop_size"), _LARGEST_AREA if by_area else _LARGEST_SIDE)
    names = ("patch_size", "temporal_patch_size", "merge_size", "pooling_kernel_size")
    parts = dict.fromkeys(names, _LARGEST_SIDE)
    for name, largest in (sides_of | areas | parts).items():
        values = fields.get(name)
        sides = values if isinstance(values, Mapping) else {"": values}
        for side, pixels in sides.items():
            if pixels is not None and not _is_whole(pixels, 1, largest):
                raise InputError(
                    f"{'.'.join(filter(None, (name, side)))} is {pixels!r:.80}; expected pixels, a "
                    f"whole number from 1 to {largest}"
                )
    factor = fields.get("rescale_factor")
    if factor is not None and not (_is_finite(factor) and factor > 0):
        raise InputError(f"rescale_factor is {factor!r:.80}; expected a number above 0, as 1/255")
    resample = fields.get("resample")
    # Pillow's filters since its first versions; newer ones have further.
    if resample is not None and not _is_whole(resample, 0, 5):
        raise InputError(f"resample is {resample!r:.80}; expected one of Pillow's filters, 0 to 5")
    for name, value in fields.items():
        if name.startswith("do_") and not (value is None or isinstance(value, bool)):
            raise InputError(f"{name} is {value!r:.80}; expected true or false")


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
