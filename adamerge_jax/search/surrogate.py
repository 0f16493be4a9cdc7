"""A quadratic surface that stands in for a score which is dear to measure."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Quadratic(NamedTuple):
    """The function `constant + linear . x + x . square x` of K numbers.

    Attributes:
        constant: Its value at 0.
        linear: `[K]`.
        square: `[K, K]`, symmetric.
    """

    constant: float
    linear: Float[np.ndarray, " K"]
    square: Float[np.ndarray, "K K"]

    def __call__(self, points: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "..."]:
        """Returns the value at each point."""
        squares = np.einsum("...i,ij,...j->...", points, self.square, points)
        return self.constant + points @ self.linear + squares

    def gradient(self, point: Float[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
        """Returns the gradient at one point."""
        return self.linear + 2 * self.square @ point


class Fit(NamedTuple):
    """A surface and how well it stands in for the values.

    Attributes:
        surface: The surface.
        error: The root mean square of its differences to the values that it was fitted to.
        left_out_error: That of each value's difference to the surface fitted to all others.
        spread: The standard deviation of the values: the error of a surface that is constant.
    """

    surface: Quadratic
    error: float
    left_out_error: float
    spread: float


def count_unknowns(dimensions: int) -> int:
    """Returns how many numbers a quadratic function of so many variables has."""
    return (dimensions + 1) * (dimensions + 2) // 2


def fit_quadratic(points: Float[np.ndarray, "N K"], values: Float[np.ndarray, " N"]) -> Fit:
    """Fits a quadratic surface by least squares, of the smallest norm where several fit alike.

    Source: Li et al., MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic
    Approximation, 2024. The errors without a value are those of Allen's PRESS (Technometrics,
    1974).

    Args:
        points: N points.
        values: The value at each.
    """
    dimensions = points.shape[1]
    rows, columns = np.triu_indices(dimensions)
    terms = np.column_stack([np.ones(len(points)), points, points[:, rows] * points[:, columns]])
    left, sizes, right = np.linalg.svd(terms, full_matrices=False)
    count = int((sizes > sizes[0] * len(terms) * np.finfo(np.float64).eps).sum())
    left, sizes, right = left[:, :count], sizes[:count], right[:count]
    numbers = right.T @ ((left.T @ values) / sizes)
    square = np.zeros((dimensions, dimensions))
    square[rows, columns] = numbers[1 + dimensions :]
    surface = Quadratic(float(numbers[0]), numbers[1 : 1 + dimensions], (square + square.T) / 2)
    differences = values - terms @ numbers
    # A point that alone decides on a number of the surface has a leverage of 1.
    influence = np.maximum(1 - (left**2).sum(1), 1e-9)
    return Fit(
        surface,
        _root_mean_square(differences),
        _root_mean_square(differences / influence),
        float(np.std(values)),
    )


def _root_mean_square(differences: Float[np.ndarray, " N"]) -> float:
    return float(np.sqrt(np.mean(differences**2)))
