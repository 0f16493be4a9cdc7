"""Augmented examples, for objectives that ask a model for the same class as of the plain ones."""

from collections.abc import Mapping

import numpy as np
import scipy
from jaxtyping import Float, Int

from adamerge_jax.data.examples import completed

TOKENS_HIDDEN = 0.2
"""Part of a text's tokens that are hidden."""

SMALLEST_CROP = 0.5
"""Part of an image's area that is shown at least."""


def augment(
    inputs: Mapping[str, np.ndarray], generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """Returns the same examples, strongly augmented.

    Texts: one token in five is hidden from attention, never the first nor the last, which are
    often special. Images: a random part of them, at least half of the area, enlarged to the whole
    and mirrored half of the time, as in aTLAS's test-time adaptation.

    Args:
        inputs: `input_ids` and `attention_mask`, `[B, T]`, without which nothing is padding; or
            `pixel_values`, `[B, channels, height, width]`.
        generator: The source of the random choices.

    Returns:
        Inputs of the same shapes, those of texts with a mask.
    """
    if "pixel_values" in inputs:
        pixels = np.stack([_crop_and_mirror(image, generator) for image in inputs["pixel_values"]])
        return dict(inputs) | {"pixel_values": pixels}
    whole = completed(inputs, ["attention_mask"])
    mask = hide_tokens(whole["attention_mask"], TOKENS_HIDDEN, generator)
    return whole | {"attention_mask": mask}


def hide_tokens(
    mask: Int[np.ndarray, "B T"], part: float, generator: np.random.Generator
) -> Int[np.ndarray, "B T"]:
    """Returns a mask that hides random tokens, never a text's first nor its last.

    Args:
        mask: 1 for each token, 0 for padding.
        part: The part of tokens that are hidden.
        generator: The source of the random choices.
    """
    hidden = generator.random(mask.shape) < part
    shown = np.cumsum(mask, axis=1)
    ends = (shown == 1) | (shown == shown[:, -1:])
    return np.where(hidden & ~ends, 0, mask).astype(mask.dtype)


def _crop_and_mirror(
    image: Float[np.ndarray, "channels height width"], generator: np.random.Generator
) -> Float[np.ndarray, "channels height width"]:
    size = np.array(image.shape[1:])
    scale = np.sqrt(generator.uniform(SMALLEST_CROP, 1))
    offset = generator.uniform(0, 1, 2) * (1 - scale) * (size - 1)
    cropped = [
        scipy.ndimage.affine_transform(channel, [scale, scale], offset, order=1, mode="nearest")
        for channel in image.astype(np.float32)
    ]
    pixels = np.stack(cropped).astype(image.dtype)
    return pixels[:, :, ::-1] if generator.random() < 0.5 else pixels
