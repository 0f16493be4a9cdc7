"""Image files of strangers: opened only as formats that run no program, and turned upright."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adamerge_jax.errors import InputError, in_one_line

if TYPE_CHECKING:
    from PIL.Image import Image

ImageFile = Path | bytes | Mapping[str, Any] | None
"""An image: a file, or the contents of one, alone or under `bytes`."""

_FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "TGA", "ICO"),
    *("PCX", "JPEG2000"),
)
"""Formats that are opened, whatever a file is called: for some others Pillow runs programs."""

_LONGEST = 200
"""The number of times that one side of an image may be as long as the other: processors that give
the shorter side a size make a line of a few bytes fill the memory."""


class ImageFiles:
    """Images of examples, opened one at a time."""

    def __init__(
        self,
        images: Sequence[ImageFile],
        name: str,
        numbers: Sequence[int] | None = None,
    ):
        """Keeps the images; none is opened.

        Args:
            images: The images.
            name: Name of the examples in error messages.
            numbers: The rows of the images in their table, for messages; their index by default.
        """
        self._images = images
        self._name = name
        self._numbers = range(len(images)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._images)

    def where(self, index: int) -> str:
        """Returns the place of an image, for error messages."""
        image = self._images[index]
        file = f" ({image})" if isinstance(image, Path) else ""
        return f"{self._name}, image {self._numbers[index]}{file}"

    def open(self, index: int) -> Image:
        """Opens an image; only its header is read.

        Raises:
            InputError: It is no image, of more pixels than Pillow takes for harmless, or a line.
        """
        import PIL.Image

        image = self._images[index]
        if isinstance(image, Mapping):
            image = image["bytes"]
        if image is None:
            raise InputError(
                f"{self.where(index)}: its table holds no image, only a path or nothing; save the "
                "table with the images in it"
            )
        if isinstance(image, Path) and not image.is_file():  # a pipe would be waited for
            raise InputError(f"{self.where(index)}: is no file; remove it, or copy it again")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
                file = image if isinstance(image, Path) else io.BytesIO(image)
                PIL.Image.init()
                built = [kind for kind in _FORMATS if kind in PIL.Image.OPEN]
                opened = PIL.Image.open(file, formats=built)
        except PIL.UnidentifiedImageError as error:
            raise InputError(
                f"{self.where(index)}: cannot be read: it is no image of a kind that is known "
                f"({', '.join(_FORMATS)})"
            ) from error
        except Exception as error:  # Pillow raises errors of many types
            raise InputError(
                f"{self.where(index)}: cannot be read: {in_one_line(error)}"
            ) from error
        width, height = opened.size
        if max(width, height) > _LONGEST * min(width, height):
            raise InputError(
                f"{self.where(index)}: has {width} x {height} pixels, one side more than "
                f"{_LONGEST} times as long as the other; cut it, or leave it out"
            )
        return opened

    def decode(self, index: int) -> Image:
        """Reads an image, turned as its camera says.

        Raises:
            InputError: It is no whole image.
        """
        from PIL import ImageOps

        try:
            with self.open(index) as image:
                image.load()
                return ImageOps.exif_transpose(image)
        except InputError:
            raise
        except Exception as error:  # Pillow raises errors of many types
            raise InputError(
                f"{self.where(index)}: cannot be read: {in_one_line(error)}"
            ) from error
