"""Interference steps: changes of task vectors before mixing, so that experts disturb less.

A step is a pair of pure functions, and steps are chained as optax chains transformations:

    ties = [trim(density=0.2), elect_sign(), disjoint_mean()]

`fit` looks once at all task vectors, `[K, *shape]` by tensor name, for a step that needs facts of
the whole model; `apply` changes one tensor. So learning and folding, which reads tensor by tensor,
do the same.

Examples:
    >>> import numpy as np
    >>> from adamerge_jax.interference import FittedStep, fit_steps
    >>> task_vectors = {"weight": np.array([[4.0, -1.0], [-3.0, -2.0]])}  # [K, *shape] by tensor
    >>> _ = fit_steps([FittedStep("elect_sign", {})], task_vectors)  # changes them in place
    >>> task_vectors["weight"].tolist()
    [[4.0, -1.0], [0.0, -2.0]]
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from adamerge_jax.interference.breadcrumbs import drop_extremes
from adamerge_jax.interference.dare import drop_and_rescale
from adamerge_jax.interference.lines import scale_by_depth
from adamerge_jax.interference.opcm import project_apart
from adamerge_jax.interference.pcb import balance_competition
from adamerge_jax.interference.sce import select_variable, weigh_by_squares
from adamerge_jax.interference.step import Step
from adamerge_jax.interference.tall_masks import consensus_mask, tall_mask
from adamerge_jax.interference.ties import disjoint_mean, elect_sign, trim
from adamerge_jax.registry import call_registered

__all__ = [
    "STEPS",
    "FittedStep",
    "Step",
    "apply_steps",
    "balance_competition",
    "consensus_mask",
    "disjoint_mean",
    "drop_and_rescale",
    "drop_extremes",
    "elect_sign",
    "fit_steps",
    "make_step",
    "project_apart",
    "scale_by_depth",
    "select_variable",
    "tall_mask",
    "trim",
    "weigh_by_squares",
]

STEPS: dict[str, Callable[..., Step]] = {
    "trim": trim,
    "elect_sign": elect_sign,
    "disjoint_mean": disjoint_mean,
    "drop_and_rescale": drop_and_rescale,
    "drop_extremes": drop_extremes,
    "balance_competition": balance_competition,
    "tall_mask": tall_mask,
    "consensus_mask": consensus_mask,
    "scale_by_depth": scale_by_depth,
    "select_variable": select_variable,
    "weigh_by_squares": weigh_by_squares,
    "project_apart": project_apart,
}
"""Interference steps by their names in a recipe."""


@dataclasses.dataclass(frozen=True)
class FittedStep:
    """A step that has seen all task vectors, as a coefficients file keeps it.

    Attributes:
        name: Its name in a recipe.
        options: Its options.
        fitted: Facts of the whole model that it has found: plain numbers.
    """

    name: str
    options: Mapping[str, Any]
    fitted: Any = None


def make_step(name: str, options: Mapping[str, Any]) -> Step:
    """Returns the step of a recipe.

    Raises:
        InputError: There is no such step, or it refuses an option.
    """
    return call_registered("interference", STEPS, name, options, returns=Step)


def fit_steps(
    steps: Sequence[FittedStep], task_vectors: Mapping[str, np.ndarray]
) -> tuple[FittedStep, ...]:
    """Runs the steps one after the other, in place.

    Args:
        steps: Steps in their order; an earlier fit is forgotten.
        task_vectors: `[K, *shape]` by tensor name; all are changed in place.

    Returns:
        The fitted steps.
    """
    if not task_vectors:
        return tuple(steps)
    fitted_steps = []
    for step in steps:
        change = make_step(step.name, step.options)
        fitted = change.fit(task_vectors)
        for name, values in task_vectors.items():
            values[...] = change.apply(name, values, fitted)
        fitted_steps.append(dataclasses.replace(step, fitted=fitted))
    return tuple(fitted_steps)


def apply_steps(steps: Sequence[FittedStep], name: str, values: np.ndarray) -> np.ndarray:
    """Returns one tensor's task vectors `[K, *shape]` as fitted steps change them."""
    for step in steps:
        values = make_step(step.name, step.options).apply(name, values, step.fitted)
    return values
