"""Slightly changed copies of images, so that few of them teach more."""

import numpy as np
from jaxtyping import Float, Int
from scipy.ndimage import affine_transform

from adamerge_jax.data.examples import Examples

LARGEST_TURN = 0.15
"""The largest angle by which a copy is turned, in radians."""

LARGEST_SCALING = 0.12
"""The largest part by which a copy is larger or smaller."""

LARGEST_SHIFT = 0.07
"""The largest shift of a copy, as a part of the image's size."""


class WithCopies(Examples):
    """Images and changed copies of them.

    The first N examples are the images themselves; example `c * N + i` is copy c of image i. A copy
    is made when it is taken, and depends on the seed and its number alone.
    """

    def __init__(self, images: Examples, copies: int, seed: int):
        """Wraps N images.

        Args:
            images: Examples with `pixel_values`.
            copies: The number of copies of each.
            seed: The seed of the changes.
        """
        self._images, self._copies, self._seed = images, copies, seed
        self.class_names = images.class_names
        self.names_have_order = images.names_have_order
        if images.labels is not None:
            self.labels = np.tile(images.labels, 1 + copies)

    def __len__(self) -> int:
        return len(self._images) * (1 + self._copies)

    def padded_lengths(self) -> Int[np.ndarray, " N"]:
        """Returns zeros, as images are not padded."""
        return np.zeros(len(self), int)

    def take(self, index: Int[np.ndarray, " B"], length: int) -> dict[str, np.ndarray]:
        """Returns the chosen images, copies changed."""
        inputs = self._images.take(index % len(self._images), length)
        pixels = np.array(inputs["pixel_values"])
        for row, number in zip(pixels, index, strict=True):
            if number >= len(self._images):
                row[...] = _changed(row, np.random.default_rng([self._seed, 6, number]))
        return {**inputs, "pixel_values": pixels}


def with_copies(
    learning: Int[np.ndarray, " M"], images: int, copies: int
) -> Int[np.ndarray, " M*(1+copies)"]:
    """Returns the indices of images to learn from, followed by those of their copies.

    Args:
        learning: The indices of M among N images.
        images: N.
        copies: The number of copies of each.
    """
    return np.concatenate([learning + copy * images for copy in range(1 + copies)])


def _changed(
    image: Float[np.ndarray, "channels height width"], generator: np.random.Generator
) -> Float[np.ndarray, "channels height width"]:
    """Turns, scales and shifts an image a little; its edge goes on where nothing is."""
    size = np.array(image.shape[1:])
    angle = generator.uniform(-LARGEST_TURN, LARGEST_TURN)
    scale = 1 + generator.uniform(-LARGEST_SCALING, LARGEST_SCALING)
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    matrix = np.array([[cosine, -sine], [sine, cosine]])
    centre = (size - 1) / 2
    shift = generator.uniform(-LARGEST_SHIFT, LARGEST_SHIFT, 2) * size
    offset = centre - matrix @ centre + shift
    return np.stack(
        [
            affine_transform(channel.astype(np.float32), matrix, offset, order=1, mode="nearest")
            for channel in image
        ]
    )
