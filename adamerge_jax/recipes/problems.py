"""The objectives of each task, by the problem that its head solves."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from adamerge_jax.errors import InputError
from adamerge_jax.methods import MergeMethod
from adamerge_jax.models.family import Family
from adamerge_jax.models.problem import CLASSES, LABELS, NUMBERS, Problem
from adamerge_jax.objectives import OBJECTIVES, TargetSpec
from adamerge_jax.recipes.presets import PRESETS
from adamerge_jax.recipes.schema import ObjectiveRecipe, Recipe


def objectives_by_task(
    recipe: Recipe, problems: Mapping[str, Problem]
) -> dict[str, list[ObjectiveRecipe]]:
    """Returns the terms that are minimised for each task.

    Args:
        recipe: The recipe. Where its objectives are its preset's, others take the place of those
            that are for classes.
        problems: The problem that the head of each task solves.

    Raises:
        InputError: A term has no meaning for the problem of a task that it counts for.
    """
    preset = PRESETS[recipe.preset]["objectives"]
    are_of_preset = recipe.objectives == [ObjectiveRecipe.model_validate(term) for term in preset]
    terms: dict[str, list[ObjectiveRecipe]] = {task: [] for task in problems}
    for task, problem in problems.items():
        for position, term in enumerate(recipe.objectives):
            field = f"preset {recipe.preset}" if are_of_preset else f"objectives.{position}"
            is_counted = bool(term.weight_of(task)) and term.name in OBJECTIVES
            if not is_counted or problem.has(term.name):
                if (
                    is_counted
                    and not are_of_preset
                    and problem != CLASSES
                    and term.options.get("cross_task")
                ):
                    raise InputError(
                        f"{field}.options.cross_task: compares classes of examples, and the "
                        f"expert of {task!r} gives {problem.predicts}; leave it out"
                    )
                terms[task].append(term)
            elif are_of_preset and term.name in problem.in_place:
                name = problem.in_place[term.name]
                terms[task].append(ObjectiveRecipe(name=name, weight=term.weight))
            else:
                others = ", or leave the task out of its weight" if len(problems) > 1 else ""
                raise InputError(
                    f"{field}: {term.name} has no meaning for task {task!r}, whose expert gives "
                    f"{problem.predicts}; take {' or '.join(problem.objectives)}{others}"
                )
    return terms


def distinct_terms(terms: Iterable[Sequence[ObjectiveRecipe]]) -> list[ObjectiveRecipe]:
    """Returns the terms of all tasks, each once, in their order."""
    distinct: list[ObjectiveRecipe] = []
    for of_task in terms:
        distinct += [term for term in of_task if term not in distinct]
    return distinct


class Predicting(Protocol):
    """The facts of opened models on what they predict.

    Attributes:
        family: The architecture family of all of them.
    """

    family: Family

    @property
    def problems(self) -> Mapping[str, Problem]:
        """The problem that the head of each expert solves, by task."""
        ...


def require_no_predictions(field: str, name: str, method: MergeMethod, models: Predicting) -> None:
    """Refuses a method that weighs experts by what they predict where they give no distribution.

    Args:
        field: The place of the method, for the message.
        name: The name of the method.
        method: The method.
        models: The models.

    Raises:
        InputError: The method is of that kind, and the models are sentence embedders, or one of
            them gives numbers.
    """
    if not method.needs_predictions:
        return
    if models.family.embeds is not None:
        raise InputError(
            f"{field}: {name} weighs experts by what they predict, and sentence embedders predict "
            "neither classes nor tokens; take another, such as regmean"
        )
    for task, problem in models.problems.items():
        if problem == NUMBERS:
            raise InputError(
                f"{field}: {name} weighs experts by how sure they are, and numbers, as the expert "
                f"of {task!r} gives, say nothing of that; take another, such as regmean"
            )


def specs_by_problem(
    specs: Mapping[str, TargetSpec], problems: Mapping[str, Problem]
) -> dict[str, TargetSpec]:
    """Returns the targets that are wanted of heads of several problems side by side.

    Experts are asked about other tasks' examples where all heads give classes of examples. Of
    classes all are kept.
    """
    specs = {
        task: spec._replace(
            top_tokens=None,
            by_label=problems[task] == LABELS,
            expert_spread=problems[task] == NUMBERS,
        )
        for task, spec in specs.items()
    }
    if all(problem == CLASSES for problem in problems.values()):
        return specs
    return {task: spec._replace(cross_task=0) for task, spec in specs.items()}
