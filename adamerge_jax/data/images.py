"""Images through the checkpoint's own image processor."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from adamerge_jax.data.examples import Examples
from adamerge_jax.errors import InputError, in_one_line

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

Preprocess = Callable[..., Mapping[str, Any]]
"""A call of an image processor of `transformers`, of `images` and `return_tensors`. Importing its
class would take every command a second or more, since that imports much of PyTorch."""

IMAGE_CACHE_BYTES = 2**30
"""The size of preprocessed images that one `ImageExamples` keeps in memory."""

_FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "TGA", "ICO"),
    *("PCX", "JPEG2000"),
)
"""Formats that are opened, whatever a file is called: for some others Pillow runs programs."""

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
        images: Sequence[Path | bytes | Mapping[str, Any]],
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
        self._name = name
        self._images = images
        self._processor = processor
        self._mode = processor.mode
        self._numbers = range(len(images)) if numbers is None else numbers
        self._cache: dict[int, Float[np.ndarray, "channels height width"]] = {}
        self._cached_bytes = 0
        modes = [self._open(index).mode for index in range(len(images))]
        self._tell_depth([i for i, mode in enumerate(modes) if mode.startswith(_DEEP_MODES)])

    def __len__(self) -> int:
        return len(self._images)

    def take(self, index: Int[np.ndarray, " B"], length: int) -> dict[str, np.ndarray]:
        return {"pixel_values": np.stack([self._pixels(int(i)) for i in index])}

    def _pixels(self, index: int) -> Float[np.ndarray, "channels height width"]:
        if index in self._cache:
            return self._cache[index]
        image = self._decode(index).convert(self._mode)
        try:
            inputs = self._processor.preprocess(images=[image], return_tensors="np")
            pixels = np.asarray(inputs["pixel_values"][0])
        except Exception as error:  # the processors' own checks raise errors of many types
            raise InputError(
                f"{self._where(index)}: the image processor (preprocessor_config.json) fails: "
                f"{in_one_line(error)}"
            ) from error
        if pixels.shape != self._processor.shape:
            raise InputError(
                f"{self._where(index)}: the image processor (preprocessor_config.json) makes "
                f"(channels, height, width) {pixels.shape} of it, the model takes "
                f"{self._processor.shape}; set the size there, or give images of that size"
            )
        if self._cached_bytes + pixels.nbytes <= IMAGE_CACHE_BYTES:
            self._cache[index] = pixels
            self._cached_bytes += pixels.nbytes
        return pixels

    def _where(self, index: int) -> str:
        image = self._images[index]
        file = f" ({image})" if isinstance(image, Path) else ""
        return f"{self._name}, image {self._numbers[index]}{file}"

    def _open(self, index: int) -> Image:
        """Opens an image; only its header is read."""
        import PIL.Image

        image = self._images[index]
        if isinstance(image, Mapping):
            image = image["bytes"]
        if image is None:
            raise InputError(
                f"{self._where(index)}: its table holds no image, only a path or nothing; save the "
                "table with the images in it"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
                file = image if isinstance(image, Path) else io.BytesIO(image)
                PIL.Image.init()
                built = [kind for kind in _FORMATS if kind in PIL.Image.OPEN]
                return PIL.Image.open(file, formats=built)
        except PIL.UnidentifiedImageError as error:
            raise InputError(
                f"{self._where(index)}: cannot be read: it is no image of a kind that is known "
                f"({', '.join(_FORMATS)})"
            ) from error
        except Exception as error:  # Pillow raises errors of many types
            raise InputError(
                f"{self._where(index)}: cannot be read: {in_one_line(error)}"
            ) from error

    def _decode(self, index: int) -> Image:
        """Reads an image, turned as its camera says."""
        from PIL import ImageOps

        try:
            with self._open(index) as image:
                image.load()
                return ImageOps.exif_transpose(image)
        except InputError:
            raise
        except Exception as error:  # Pillow raises errors of many types
            raise InputError(
                f"{self._where(index)}: cannot be read: {in_one_line(error)}"
            ) from error

    def _tell_depth(self, deep: Sequence[int]) -> None:
        """Warns of images with values over 255, which 8 bits cut off as `transformers` does."""
        for index in deep:
            low, high = self._decode(index).getextrema()
            if low < 0 or high > 255:
                log.warning(
                    "%s: values from %s to %s are cut to those of 8 bits, 0 to 255, as "
                    "transformers does; if the expert learned from scaled ones, save the images "
                    "so, in 8 bits (%d of %d images have more)",
                    self._where(index),
                    low,
                    high,
                    len(deep),
                    len(self),
                )
                return
