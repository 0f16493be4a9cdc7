"""Images through the checkpoint's own image processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from adamerge_jax.data.examples import Examples
from adamerge_jax.errors import InputError

ImageProcessor = Callable[..., Mapping[str, Any]]
"""An image processor of `transformers`, of `images` and `return_tensors`. Importing its class would
take every command a second or more, since that imports much of PyTorch."""

IMAGE_CACHE_BYTES = 2**30
"""The size of preprocessed images that one `ImageExamples` keeps in memory."""


class ImageExamples(Examples):
    """Images, opened and preprocessed when they are first taken, and kept while there is room."""

    def __init__(self, images: Sequence[Any], processor: ImageProcessor, name: str):
        self._name = name
        self._images = images
        self._processor = processor
        self._cache: dict[int, Float[np.ndarray, "channels height width"]] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self._images)

    def take(self, index: Int[np.ndarray, " B"], length: int) -> dict[str, np.ndarray]:
        return {"pixel_values": np.stack([self._pixels(int(i)) for i in index])}

    def _pixels(self, index: int) -> Float[np.ndarray, "channels height width"]:
        if index in self._cache:
            return self._cache[index]
        try:
            image = self._images[index].convert("RGB")
        except Exception as error:  # Pillow raises errors of many types
            reason = " ".join(str(error).split())
            raise InputError(f"{self._name}, image {index}: cannot be read: {reason}") from error
        pixels = self._processor(images=[image], return_tensors="np")["pixel_values"][0]
        if self._cached_bytes + pixels.nbytes <= IMAGE_CACHE_BYTES:
            self._cache[index] = pixels
            self._cached_bytes += pixels.nbytes
        return pixels
