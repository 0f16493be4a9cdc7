"""Slightly changed copies of examples, so that few of them teach more."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy
from jaxtyping import Bool, Float, Int

from adamerge_jax.data.augmentations import hide_tokens
from adamerge_jax.data.examples import Examples, completed

MOST_HIDDEN = 0.3
"""The largest part of a text's tokens that a copy hides."""

LARGEST_TURN = 0.15
"""The largest angle by which a copy is turned, in radians."""

LARGEST_SCALING = 0.12
"""The largest part by which a copy is larger or smaller."""

LARGEST_SHIFT = 0.07
"""The largest shift of a copy, as a part of the image's size."""

_LARGE = 30_000
"""The values of an image from which its copy takes longer than handing it to another thread."""


class WithCopies(Examples):
    """Examples and changed copies of them.

    The first N examples are unchanged; example `c * N + i` is copy c of example i. An image's copy
    is turned, scaled and shifted a little; a text's hides some of its tokens from attention, never
    the first nor the last. A copy is made when it is taken, and depends on the seed and its number
    alone.

    Attributes:
        unchanged: The N examples alone.
        copies: The number of copies of each.
    """

    def __init__(self, examples: Examples, copies: int, seed: int):
        """Wraps N examples.

        Args:
            examples: Images or texts of a classifier.
            copies: The number of copies of each.
            seed: The seed of the changes.
        """
        self.unchanged, self.copies, self._seed = examples, copies, seed
        self.class_names = examples.class_names
        self.names_have_order = examples.names_have_order
        self.texts = examples.texts
        if examples.labels is not None:
            self.labels = np.concatenate([examples.labels] * (1 + copies))
        if examples.partners is not None:
            self.partners = np.tile(examples.partners, 1 + copies)

    def with_fewer(self, most: int) -> "WithCopies":
        """Returns the same with fewer copies, such that they are `most` examples or N."""
        copies = copies_within(most, len(self.unchanged), self.copies)
        return WithCopies(self.unchanged, copies, self._seed)

    def __len__(self) -> int:
        return len(self.unchanged) * (1 + self.copies)

    def padded_length(self, index: Int[np.ndarray, " B"]) -> int:
        """Returns the tokens that chosen examples are padded to, copies as what they are of."""
        return self.unchanged.padded_length(index % len(self.unchanged))

    def padded_lengths(self) -> Int[np.ndarray, " N"]:
        """Returns the tokens that each example alone is padded to."""
        return np.tile(self.unchanged.padded_lengths(), 1 + self.copies)

    def take_labels(
        self, index: Int[np.ndarray, " B"], length: int
    ) -> Int[np.ndarray, "B ..."] | None:
        """Returns the labels of the chosen examples, of copies those of what they are of."""
        return self.unchanged.take_labels(index % len(self.unchanged), length)

    def take_counted(
        self, index: Int[np.ndarray, " B"], length: int
    ) -> Bool[np.ndarray, "B T"] | None:
        """Returns True for the tokens that words are classified by; None for other problems."""
        return self.unchanged.take_counted(index % len(self.unchanged), length)

    def take(self, index: Int[np.ndarray, " B"], length: int) -> dict[str, np.ndarray]:
        """Returns the chosen examples, copies changed."""
        inputs = self.unchanged.take(index % len(self.unchanged), length)
        name, change = "pixel_values", _changed_image
        if name not in inputs:
            name, change = "attention_mask", _hidden_tokens
            inputs = completed(inputs, [name])
        rows = np.array(inputs[name])

        def make_copy(position: int) -> None:
            generator = np.random.default_rng([self._seed, 6, index[position]])
            rows[position] = change(rows[position], generator)

        _for_all(make_copy, np.flatnonzero(index >= len(self.unchanged)), rows[0].size >= _LARGE)
        return {**inputs, name: rows}


def copies_within(most: int, examples: int, copies: int) -> int:
    """Returns how many copies of each example there may be.

    Args:
        most: The number of examples with their copies, at most, unless there are more without.
        examples: The number of examples.
        copies: The number of copies that there are of each.
    """
    return min(copies, max(0, most // examples - 1))


def with_copies(
    learning: Int[np.ndarray, " M"], examples: int, copies: int
) -> Int[np.ndarray, " M*(1+copies)"]:
    """Returns the indices of examples to learn from, followed by those of their copies.

    Args:
        learning: The indices of M among N examples.
        examples: N.
        copies: The number of copies of each.
    """
    return np.concatenate([learning + copy * examples for copy in range(1 + copies)])


def _for_all(make: Callable[[int], None], positions: Sequence[int], in_threads: bool) -> None:
    """Calls a function with each position, in threads where what it calls lets go of the lock."""
    if not in_threads or len(positions) < 2:
        for position in positions:
            make(position)
        return
    with ThreadPoolExecutor(min(len(positions), os.cpu_count() or 1)) as threads:
        for _ in threads.map(make, positions):  # raises what a thread raised
            pass


def _hidden_tokens(
    mask: Int[np.ndarray, "*texts length"], generator: np.random.Generator
) -> Int[np.ndarray, "*texts length"]:
    """Hides up to `MOST_HIDDEN` of the tokens of a text, or of both of a pair."""
    texts = mask.reshape(-1, mask.shape[-1])
    return hide_tokens(texts, generator.uniform(0, MOST_HIDDEN), generator).reshape(mask.shape)


def _changed_image(
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
            scipy.ndimage.affine_transform(
                channel.astype(np.float32), matrix, offset, order=1, mode="nearest"
            )
            for channel in image
        ]
    )
