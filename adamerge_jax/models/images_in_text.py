"""The images that a language model reads among its tokens, as arrays of fixed shape.

A batch of B conversations with at most I images each has, beside `input_ids` and `attention_mask`:

    pixel_values  [B, I, channels, height, width]; or [B, I, t, h, w, F], the patches of an image,
                  each F numbers, in a grid of t frames, h rows and w columns; or
                  [B, I, tiles, channels, height, width], the tiles that an image is cut into
    image_sizes   [B, 0, height, width], beside tiles: no numbers, but a shape that tells the height
                  and width of an image before it was cut
    image_count   [B], the number of each conversation's images; the others are padding
    position_ids  [B, 3, T], of models whose tokens have positions in images

So grids and sizes of images are known from shapes alone, as a compiled function needs them.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int

PIXELS = "pixel_values"
"""The images' array."""

COUNT = "image_count"
"""The array of their numbers."""

SIZES = "image_sizes"
"""The array whose shape tells the size of an image that is cut into tiles."""

Grid = tuple[int, int, int]
"""Frames, rows and columns of an image's patches."""


class ImagesInText(Protocol):
    """The part of a model that knows where its images are among the tokens.

    Attributes:
        token: The token that stands for a piece of an image.
    """

    token: int

    def positions(self, tokens: Sequence[int], grid: Grid | None) -> Int[np.ndarray, "3 T"] | None:
        """Returns the positions of a conversation's tokens; None if they are 0, 1, 2, ...

        Args:
            tokens: The tokens of one conversation, without padding.
            grid: The grid of each of its images; None where the model has no grids.
        """
        ...
