"""The front of several scores: the points at which no score rises without another one's fall."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from adamerge_jax.search.surrogate import Quadratic

_STARTS = 4
"""The number of places from which the best point for a set of weights is climbed to."""

_SUM_WEIGHT = 0.05
"""The part of the sum in a weighted sweep, which leads off points that others dominate."""

_LEAST_WEIGHT = 0.02
"""The weight of a score that would have none: of points alike in all others, the better in it."""


def spread_out(points: Float[np.ndarray, "N D"], first: Sequence[int], count: int) -> list[int]:
    """Returns positions of points that lie far from each other.

    Args:
        points: N points.
        first: Positions that are taken in any case.
        count: How many to take, at most N; each further one is the farthest from those before.
    """
    taken = list(dict.fromkeys(first))[:count]
    while len(taken) < min(count, len(points)):
        distances = np.linalg.norm(points[:, None] - points[taken], axis=-1).min(1)
        distances[taken] = -1
        taken.append(int(distances.argmax()))
    return taken


def weight_sets(tasks: int, count: int, seed: int) -> Float[np.ndarray, "count T"]:
    """Returns sets of weights that sum to 1: equal ones, each task alone, and others between."""
    drawn = np.random.default_rng(seed).dirichlet(np.ones(tasks), 1000)
    candidates = np.concatenate([np.full((1, tasks), 1 / tasks), np.eye(tasks), drawn])
    return candidates[spread_out(candidates, range(1 + tasks), count)]


def sweep(
    surfaces: Sequence[Quadratic],
    weights: Float[np.ndarray, "P T"],
    bounds: tuple[float, float],
    seed: int,
) -> Float[np.ndarray, "P K"]:
    """Returns the best point for each set of weights, on surfaces in place of scores.

    Best is the smallest of the largest weighted distances to the best value of each surface
    (augmented Chebyshev scalarization: Miettinen, Nonlinear Multiobjective Optimization, 1998),
    which reaches every part of a front, also those that are not convex.

    Args:
        surfaces: The surface of each of T scores, functions of K numbers; more is better.
        weights: P sets of weights; a score without weight has a very small one.
        bounds: The smallest and the largest of the K numbers.
        seed: The seed of the places that are climbed from.
    """
    from scipy.optimize import Bounds, minimize
    from scipy.stats import qmc

    dimensions = len(surfaces[0].linear)
    places = qmc.scale(
        qmc.Sobol(dimensions, seed=seed).random(1024),
        *np.repeat(np.array(bounds)[:, None], dimensions, axis=1),
    )
    values = np.stack([surface(places) for surface in surfaces], axis=1)
    tops = []
    for surface, of_surface in zip(surfaces, values.T, strict=True):
        climbed = minimize(
            lambda point, surface=surface: -surface(point),
            places[of_surface.argmax()],
            jac=lambda point, surface=surface: -surface.gradient(point),
            bounds=Bounds(*bounds),
        )
        tops.append(climbed.x)
    ideal = np.array([surface(top) for surface, top in zip(surfaces, tops, strict=True)])
    worst = np.array([min(surface(top) for top in tops) for surface in surfaces])
    extent = np.maximum(ideal - worst, 1e-9)

    def best_point(of_tasks: Float[np.ndarray, " T"]) -> Float[np.ndarray, " K"]:
        factors = np.maximum(of_tasks, _LEAST_WEIGHT) / extent

        def distances(point: Float[np.ndarray, " K"]) -> Float[np.ndarray, " T"]:
            at_point = np.array([surface(point) for surface in surfaces])
            return factors * (ideal - at_point)

        def slopes(point: Float[np.ndarray, " K"]) -> Float[np.ndarray, "T K"]:
            return -factors[:, None] * np.stack([s.gradient(point) for s in surfaces])

        def total(point: Float[np.ndarray, " K"]) -> float:
            away = distances(point)
            return float(away.max() + _SUM_WEIGHT * away.sum())

        of_places = factors * (ideal - values)
        order = np.argsort(of_places.max(1) + _SUM_WEIGHT * of_places.sum(1))
        candidates = [*places[order[:_STARTS]], *tops]
        for start in list(candidates):
            # The largest distance is one more variable, over all distances.
            climbed = minimize(
                lambda x: x[-1] + _SUM_WEIGHT * distances(x[:-1]).sum(),
                np.append(start, distances(start).max()),
                jac=lambda x: np.append(_SUM_WEIGHT * slopes(x[:-1]).sum(0), 1.0),
                bounds=[bounds] * dimensions + [(None, None)],
                constraints={
                    "type": "ineq",
                    "fun": lambda x: x[-1] - distances(x[:-1]),
                    "jac": lambda x: np.column_stack([-slopes(x[:-1]), np.ones(len(surfaces))]),
                },
                method="SLSQP",
            )
            candidates.append(np.clip(climbed.x[:-1], *bounds))
        return min(candidates, key=total)

    return np.stack([best_point(of_tasks) for of_tasks in weights])
