"""The search for the best point by CMA-ES, on any score."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from adamerge_jax.errors import InputError


class Best(NamedTuple):
    """The best point of a search.

    Attributes:
        point: The point, `[n]`.
        score: Its score; more is better.
    """

    point: Float[np.ndarray, " n"]
    score: float


def require_installed() -> None:
    """Refuses a search where its package is not there.

    Raises:
        InputError: Says how to install it.
    """
    if find_spec("cmaes") is None:
        raise InputError(
            "search needs the package cmaes; install it with pip install 'adamerge_jax[search]'"
        )


def evolve(
    score: Callable[[Float[np.ndarray, " n"]], float],
    start: Best,
    *,
    evaluations: int,
    sigma: float,
    bounds: tuple[float, float],
    seed: int,
    population: int | None = None,
) -> Best:
    """Searches for the point with the highest score.

    Points are drawn from a normal distribution whose mean and covariance follow the better half of
    each generation (CMA-ES: Hansen, The CMA Evolution Strategy: A Tutorial, 2016). The last point
    is the mean of the last distribution, unless that is the start: with a noisy score it is better
    than any point that was drawn. The same seed and
    scores give the same points, so that a search can be gone through again from a list of scores.

    Args:
        score: The score of a point, more is better; one that is not finite is the worst.
        start: The mean of the first distribution, and its score.
        evaluations: The number of points to score, fewer where the distribution has shrunk to one.
        sigma: The standard deviation of the first distribution.
        bounds: The smallest and the largest value of an entry.
        seed: The seed of all draws.
        population: The number of points of a generation; by default `4 + 3 ln n`.

    Returns:
        The best of the start and of all points.
    """
    from cmaes import CMA

    best = start
    box = np.tile(np.array(bounds, np.float64), (len(start.point), 1))
    strategy = CMA(
        mean=np.array(start.point, np.float64),
        sigma=sigma,
        bounds=box,
        seed=seed,
        population_size=population,
    )

    def scored(point: Float[np.ndarray, " n"]) -> float:
        nonlocal best
        of_point = score(point)
        if not np.isfinite(of_point):
            return -np.inf
        if of_point > best.score:
            best = Best(point, of_point)
        return of_point

    left = evaluations
    while left > 1 and not strategy.should_stop():
        size = min(strategy.population_size, left - 1)
        points = [strategy.ask() for _ in range(size)]
        # It looks for the smallest value.
        generation = [(point, -scored(point)) for point in points]
        left -= size
        if size == strategy.population_size:
            strategy.tell(generation)
    if left:
        is_start = strategy.generation == 0
        scored(strategy.ask() if is_start else np.clip(strategy.mean, *bounds))
    return best
