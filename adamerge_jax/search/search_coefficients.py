"""Searches for coefficients by a score, without gradients."""

from typing import NamedTuple

import numpy as np

from adamerge_jax.errors import InputError
from adamerge_jax.pipeline.models import Models
from adamerge_jax.recipes.build import HeadChoice, Method, build
from adamerge_jax.recipes.schema import Recipe, SearchRecipe
from adamerge_jax.runs.evaluations import Evaluation
from adamerge_jax.search.candidates import Candidates, Point
from adamerge_jax.search.evolution import Best, evolve
from adamerge_jax.search.scored import Scored
from adamerge_jax.search.scores import Score

SINGLE, SEARCH = "single", "search"
"""The phases of a search: the same coefficient everywhere, then all of them by evolution."""


class Searched(NamedTuple):
    """The result of a search.

    Attributes:
        point: The best coefficients.
        evaluation: Their evaluation.
        single: The best single coefficient, which the search started from.
    """

    point: Point
    evaluation: Evaluation
    single: float


def without_learning(recipe: Recipe) -> Recipe:
    """Returns the recipe with general text for the table of results alone, as nothing is learned.

    Args:
        recipe: The recipe.
    """
    retain = recipe.retain
    if retain is not None:
        tested = any(task.test is not None for task in recipe.tasks.values())
        retain = retain.model_copy(update={"weight": 0.0}) if tested else None
    return recipe.model_copy(update={"retain": retain})


def method_without_objective(recipe: Recipe, models: Models) -> Method:
    """Returns the recipe's method without its objectives: no expert is asked, nothing is learned.

    Args:
        recipe: The recipe, of which the models, the data and the interference steps count.
        models: The base and its experts.
    """
    return build(recipe, models)._replace(
        target_specs={},
        start=None,
        initial_merge=None,
        constraint="free",
        heads=HeadChoice("kept"),
        batch_size=1,  # however few calibration examples there are, they are not looked at
    )


def singles(recipe: Recipe, bounds: tuple[float, float], field: str) -> list[float]:
    """Returns the single coefficients that are tried first: those of task arithmetic.

    Args:
        recipe: The recipe.
        bounds: The smallest and the largest coefficient.
        field: The field of the recipe with these, for messages.

    Raises:
        InputError: All of them are out of bounds.
    """
    low, high = bounds
    inside = [value for value in recipe.evaluation.task_arithmetic if low <= value <= high]
    if not inside:
        raise InputError(
            f"{field}: no single coefficient of evaluation.task_arithmetic, with which it starts, "
            f"is within {low:g} to {high:g}; change one of the two"
        )
    return inside


def singles_of_search(recipe: Recipe) -> list[float]:
    """Returns the single coefficients that a search starts with.

    Raises:
        InputError: All of them are out of bounds, or no evaluation is left after them.
    """
    grid = singles(recipe, recipe.search.bounds, "search.bounds")
    if recipe.search.evaluations <= len(grid):
        raise InputError(
            f"search.evaluations: {recipe.search.evaluations} leave nothing to search with after "
            f"the {len(grid)} single coefficients of evaluation.task_arithmetic; give more, or "
            "fewer of these"
        )
    return grid


def search_coefficients(
    candidates: Candidates,
    score: Score,
    scored: Scored,
    settings: SearchRecipe,
    grid: list[float],
    seed: int,
) -> Searched:
    """Tries single coefficients, then searches from the best of them for all coefficients.

    Args:
        candidates: The merges.
        score: Their score.
        scored: The evaluations, which may be those of a run that was interrupted.
        settings: The number of evaluations, and how the search draws.
        grid: The single coefficients.
        seed: The seed of all draws.

    Raises:
        InputError: A command that measures the score fails.
    """
    for value in grid:
        scored(candidates.all_at(value), SINGLE)
    best_single = scored.best()
    single = grid[best_single.number - 1]
    evolve(
        lambda point: scored.signed(scored(point, SEARCH)),
        Best(candidates.all_at(single), scored.signed(best_single)),
        evaluations=settings.evaluations - len(grid),
        sigma=settings.sigma,
        bounds=settings.bounds,
        seed=seed,
        population=settings.population,
    )
    best = scored.best()
    if not np.isfinite(best.score):
        raise InputError("search: no merge has a finite score; look at the data and the bounds")
    return Searched(candidates.point(best.coefficients), best, single)
