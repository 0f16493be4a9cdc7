"""Resizing of images as PyTorch's `interpolate` does it, by a product with a matrix per axis."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def resizer(filter_of: Callable[..., np.ndarray], *, antialias: bool) -> Callable[..., Array]:
    """Returns the operation of aten that resizes the last two axes by a filter.

    Args:
        filter_of: The filter.
        antialias: True to widen it where images become smaller.
    """

    def resize(
        x: Float[Array, "... h w"],
        output_size: Sequence[int] | None,
        align_corners: bool,
        scales: Sequence[float] | float | None = None,
        scale_of_columns: float | None = None,
    ) -> Float[Array, "... h2 w2"]:
        factors: Any = scales if isinstance(scales, list | tuple) else (scales, scale_of_columns)
        for axis, place in enumerate((-2, -1)):
            size = x.shape[place]
            factor = factors[axis]
            new = int(size * factor) if output_size is None else int(output_size[axis])
            step = size / new if not factor or align_corners else 1 / factor
            if align_corners:
                step = (size - 1) / (new - 1) if new > 1 else 0.0
            if new == size and step == 1:
                continue
            make = _antialiased if antialias else _at_points
            matrix = make(filter_of, size, new, step, align_corners)
            x = jnp.moveaxis(
                jnp.tensordot(x, jnp.asarray(matrix, x.dtype), [[x.ndim + place], [0]]), -1, place
            )
        return x

    return resize


def triangle(distance: np.ndarray, *, antialias: bool) -> np.ndarray:
    """Returns the weights of linear interpolation at distances from a point."""
    return np.maximum(1 - np.abs(distance), 0)


def cubic(distance: np.ndarray, *, antialias: bool) -> np.ndarray:
    """Returns the weights of cubic interpolation at distances from a point, as PyTorch has them."""
    x = np.abs(distance)
    a = -0.5 if antialias else -0.75
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _at_points(
    filter_of: Callable[..., np.ndarray], size: int, new: int, step: float, align_corners: bool
) -> Float[np.ndarray, "size new"]:
    """Returns the weights of entries in values between them; the edge's entry goes on for ever."""
    points = np.arange(new) * step if align_corners else (np.arange(new) + 0.5) * step - 0.5
    if filter_of is triangle:
        points = np.maximum(points, 0)
    matrix = np.zeros((size, new))
    first = np.floor(points).astype(int)
    for offset in (-1, 0, 1, 2):
        weights = filter_of(points - first - offset, antialias=False)
        np.add.at(matrix, (np.clip(first + offset, 0, size - 1), np.arange(new)), weights)
    return matrix


def _antialiased(
    filter_of: Callable[..., np.ndarray], size: int, new: int, step: float, align_corners: bool
) -> Float[np.ndarray, "size new"]:
    """Returns the weights of entries in averages over the filter, which is cut at the edges."""
    width = max(step, 1.0)
    support = width * (1 if filter_of is triangle else 2)
    centres = step * (np.arange(new) + 0.5)
    entries = np.arange(size)[:, None]
    matrix = filter_of((entries - centres + 0.5) / width, antialias=True)
    starts = np.maximum((centres - support + 0.5).astype(int), 0)
    ends = np.minimum((centres + support + 0.5).astype(int), size)
    matrix = np.where((entries >= starts) & (entries < ends), matrix, 0.0)
    return matrix / matrix.sum(0)
