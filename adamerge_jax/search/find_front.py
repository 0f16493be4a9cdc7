"""Finds the front of what one task costs another, from few measured merges (MAP)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from adamerge_jax.errors import InputError
from adamerge_jax.recipes.schema import FrontRecipe
from adamerge_jax.runs.evaluations import Evaluation
from adamerge_jax.runs.front import non_dominated
from adamerge_jax.search.candidates import Candidates
from adamerge_jax.search.pareto import spread_out, sweep, weight_sets
from adamerge_jax.search.scored import Scored
from adamerge_jax.search.search_coefficients import SINGLE
from adamerge_jax.search.surrogate import Fit, count_unknowns, fit_quadratic

SAMPLE, FRONT = "sample", "front"
"""The phases of a front after the single coefficients: merges to fit to, and merges that the
surfaces say are on the front."""

ROUNDS = 2
"""How often points of the front are taken from the surfaces and measured; then these are fitted
again, with the new points, which lie where it matters."""


class FoundFront(NamedTuple):
    """The front of several tasks.

    Attributes:
        evaluations: The points of the front, from the best to the worst in the first task.
        fits: The surface of each task, fitted to all merges that were measured.
        predicted: The score of each point and task on surfaces that were fitted without it.
        measured: All merges with finite scores.
    """

    evaluations: list[Evaluation]
    fits: dict[str, Fit]
    predicted: list[dict[str, float]]
    measured: list[Evaluation]


def count_samples(settings: FrontRecipe, experts: int) -> int:
    """Returns how many merges are drawn to fit surfaces to.

    Raises:
        InputError: There are fewer than a surface has numbers.
    """
    unknowns = count_unknowns(experts)
    samples = 4 * unknowns if settings.samples is None else settings.samples
    if samples <= unknowns:
        raise InputError(
            f"front.samples: {samples} merges cannot tell the {unknowns} numbers of a quadratic "
            f"surface of {experts} coefficients; give at least {unknowns + 1}, better "
            f"{4 * unknowns}"
        )
    return samples


def find_front(
    candidates: Candidates,
    scored: Scored,
    settings: FrontRecipe,
    grid: list[float],
    samples: int,
    seed: int,
) -> FoundFront:
    """Measures merges, fits a surface to each task's score, and measures what these say is best.

    The front is of measured merges alone; the surfaces say where to measure.

    Args:
        candidates: The merges, by one coefficient of each expert.
        scored: The evaluations, which may be those of a run that was interrupted.
        settings: The bounds, and the number of points.
        grid: The single coefficients.
        samples: The number of merges to draw.
        seed: The seed of all draws.

    Source: Li et al., MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic
    Approximation, 2024. Its points on the surfaces come from an evolutionary algorithm, here from
    a sweep of weights, and are measured.
    """
    for value in grid:
        scored(candidates.all_at(value), SINGLE)
    for point in _draw(candidates.size, samples, settings.bounds, seed):
        scored(point, SAMPLE)
    for number in range(ROUNDS):
        measured = _Measured.of(candidates, scored)
        surfaces = [fit.surface for fit in measured.fits()]
        weights = weight_sets(len(surfaces), settings.points, seed + number)
        points = measured.points
        for point in sweep(surfaces, weights, settings.bounds, seed + number):
            if np.abs(points - point).max(1).min() > 1e-6:
                scored(point, FRONT)
                points = np.vstack([points, point])
    measured = _Measured.of(candidates, scored)
    tasks = list(measured.evaluations[0].tasks)
    predicted = []
    chosen = _choose(measured.scores, settings.points)
    for position in chosen:
        fits = measured.without(position).fits()
        values = [scored.sign * float(fit.surface(measured.points[position])) for fit in fits]
        predicted.append(dict(zip(tasks, values, strict=True)))
    return FoundFront(
        [measured.evaluations[position] for position in chosen],
        dict(zip(tasks, measured.fits(), strict=True)),
        predicted,
        measured.evaluations,
    )


class _Measured(NamedTuple):
    """The merges that have finite scores: N points and T scores, of which more is better."""

    evaluations: list[Evaluation]
    points: Float[np.ndarray, "N K"]
    scores: Float[np.ndarray, "N T"]

    @classmethod
    def of(cls, candidates: Candidates, scored: Scored) -> "_Measured":
        """Returns all merges that were measured.

        Raises:
            InputError: Too few have finite scores.
        """
        finite = [e for e in scored.evaluations if np.isfinite(list(e.tasks.values())).all()]
        needed = count_unknowns(candidates.size) + 1
        if len(finite) < needed or all(e.phase != SINGLE for e in finite):
            raise InputError(
                f"front: {len(finite)} of {len(scored.evaluations)} merges have finite scores, and "
                f"{needed} are needed, single coefficients among them; take narrower front.bounds"
            )
        return cls(
            finite,
            np.stack([candidates.point(e.coefficients) for e in finite]),
            scored.sign * np.array([list(e.tasks.values()) for e in finite]),
        )

    def fits(self) -> list[Fit]:
        """Returns the surface of each score."""
        return [fit_quadratic(self.points, of_task) for of_task in self.scores.T]

    def without(self, position: int) -> "_Measured":
        """Returns all but one of them."""
        others = np.delete(np.arange(len(self.points)), position)
        evaluations = [self.evaluations[other] for other in others]
        return _Measured(evaluations, self.points[others], self.scores[others])


def _draw(
    dimensions: int, count: int, bounds: tuple[float, float], seed: int
) -> Float[np.ndarray, "count K"]:
    """Draws points that fill a box evenly."""
    from scipy.stats import qmc

    power = int(np.ceil(np.log2(count)))
    low, high = bounds
    return low + (high - low) * qmc.Sobol(dimensions, seed=seed).random_base2(power)[:count]


def _choose(scores: Float[np.ndarray, "N T"], count: int) -> list[int]:
    """Returns positions of the front, in the order of the first score.

    The best on average and the best in each task are among them; the others lie far apart.
    """
    front = np.flatnonzero(non_dominated(scores))
    extent = np.maximum(np.ptp(scores[front], axis=0), 1e-12)
    scaled = (scores[front] - scores[front].min(0)) / extent
    first = [int(scores[front].mean(1).argmax()), *map(int, scaled.argmax(0))]
    chosen = front[spread_out(scaled, first, count)]
    return sorted(map(int, chosen), key=lambda position: -scores[position, 0])
