"""The four tasks of the quickstart: the same digits, changed in four ways.

Whatever helps with one of them hurts with another, so that adding up the experts is not enough.
"""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float

from adamerge_jax.quickstart.digits import Images

TASKS: Mapping[str, Callable[[Images], Images]] = {
    "upright": lambda images: images,
    "rotated": lambda images: images[:, ::-1, ::-1],
    "inverted": lambda images: 1 - images,
    "faint": lambda images: images / 4,
}
"""The change of each task to images with values from 0 to 1: none, a turn by 180 degrees, dark on
light for light on dark, a quarter of the contrast."""


def shift(generator: np.random.Generator, images: Images) -> Images:
    """Returns the images, each moved by up to one pixel."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[1:], axis=(1, 2))
    offsets = generator.integers(0, 3, (2, len(images)))
    return windows[np.arange(len(images)), *offsets]


def reorient(generator: np.random.Generator, images: Images) -> Images:
    """Returns the images, each turned and mirrored into a random one of eight orientations."""
    chosen = generator.random((3, len(images), 1, 1)) < 0.5
    images = np.where(chosen[0], images[:, :, ::-1], images)
    images = np.where(chosen[1], images[:, ::-1, :], images)
    return np.where(chosen[2], images.swapaxes(1, 2), images)


def pixels(images: Images) -> Float[np.ndarray, "N 1 height width"]:
    """Returns the model's input: values from -1 to 1, one channel."""
    return np.ascontiguousarray(2 * images[:, None] - 1)
