"""Images through the checkpoint's own image processor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from adamerge_jax.data.array_cache import ArrayCache
from adamerge_jax.data.examples import Examples
from adamerge_jax.data.image_files import ImageFile, ImageFiles
from adamerge_jax.errors import InputError, in_one_line

log = logging.getLogger(__name__)

Preprocess = Callable[..., Mapping[str, Any]]
"""A call of an image processor of `transformers`, of `images` and `return_tensors`. Importing its
class would take every command a second or more, since that imports much of PyTorch."""

IMAGE_CACHE_BYTES = 2**30
"""The size of preprocessed images that one `ImageExamples` keeps in memory."""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode of 8 bits for each number of channels that image files have."""

_DEEP_MODES = ("I", "F")
"""The first letters of Pillow's modes of more than 8 bits."""


class ImageProcessor(NamedTuple):
    """A checkpoint's image processor, and the images that its model takes.

    Attributes:
        preprocess: The processor.
        shape: Channels, height and width of the images that the model takes.
    """

    preprocess: Preprocess
    shape: tuple[int, int, int]

    @property
    def mode(self) -> str:
        """Pillow's mode with as many channels as the model takes.

        Raises:
            InputError: Image files have no such number of channels.
        """
        channels = self.shape[0]
        if channels not in _MODES:
            raise InputError(
                f"the model takes images of {channels} channels, image files have 1, 3 or 4; give "
                "NumPy files (.npz) of pixel_values"
            )
        return _MODES[channels]


class ImageExamples(Examples):
    """Images, opened and preprocessed when they are first taken, and kept while there is room."""

    def __init__(
        self,
        images: Sequence[ImageFile],
        processor: ImageProcessor,
        name: str,
        numbers: Sequence[int] | None = None,
    ):
        """Reads the headers of all images.

        Args:
            images: Files, or the contents of files, alone or under `bytes`.
            processor: The image processor.
            name: Name of the examples in error messages.
            numbers: The rows of the images in their table, for messages; their index by default.

        Raises:
            InputError: One is no image, or of more pixels than Pillow takes for harmless.
        """
        self._files = ImageFiles(images, name, numbers)
        self._processor = processor
        self._mode = processor.mode
        self._cache = ArrayCache(IMAGE_CACHE_BYTES)
        modes = [self._files.open(index).mode for index in range(len(images))]
        self._tell_depth([i for i, mode in enumerate(modes) if mode.startswith(_DEEP_MODES)])

    def __len__(self) -> int:
        return len(self._files)

    def take(self, index: Int[np.ndarray, " B"], length: int) -> dict[str, np.ndarray]:
        return {"pixel_values": np.stack([self._pixels(int(i)) for i in index])}

    def _pixels(self, index: int) -> Float[np.ndarray, "channels height width"]:
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        image = self._files.decode(index).convert(self._mode)
        try:
            inputs = self._processor.preprocess(images=[image], return_tensors="np")
            pixels = np.asarray(inputs["pixel_values"][0])
        except Exception as error:  # the processors' own checks raise errors of many types
            raise InputError(
                f"{self._files.where(index)}: the image processor (preprocessor_config.json) "
                f"fails: {in_one_line(error)}"
            ) from error
        if pixels.shape != self._processor.shape:
            raise InputError(
                f"{self._files.where(index)}: the image processor (preprocessor_config.json) makes "
                f"(channels, height, width) {pixels.shape} of it, the model takes "
                f"{self._processor.shape}; set the size there, or give images of that size"
            )
        self._cache.keep(index, pixels)
        return pixels

    def _tell_depth(self, deep: Sequence[int]) -> None:
        """Warns of images with values over 255, which 8 bits cut off as `transformers` does."""
        for index in deep:
            low, high = self._files.decode(index).getextrema()
            if low < 0 or high > 255:
                log.warning(
                    "%s: values from %s to %s are cut to those of 8 bits, 0 to 255, as "
                    "transformers does; if the expert learned from scaled ones, save the images "
                    "so, in 8 bits (%d of %d images have more)",
                    self._files.where(index),
                    low,
                    high,
                    len(deep),
                    len(self),
                )
                return
