"""The choice of the best coefficients by held-out data."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from adamerge_jax.data.batches import Batch, Calibration
from adamerge_jax.devices import Devices
from adamerge_jax.learning.learner import Frozen, Learner, State
from adamerge_jax.objectives import NOT_PREDICTED

COLLAPSED = 0.95
"""The predictions of a task have collapsed if at least this part of them is one class, ..."""

SPREAD = 0.85
"""... which was under this part at the start."""

FEWEST_TO_JUDGE = 16
"""Held-out examples of a task under which a collapse cannot be told from chance."""

FEWEST_TO_CHOOSE = 32
"""Held-out examples of all tasks under which one good step cannot be told from another."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeldOutMetrics:
    """Metrics of some coefficients on the held-out calibration data.

    Attributes:
        objective: The objective of each task, `[tasks]`.
        agreement: Part of each task's examples (of a language model, of the tokens to predict)
            that get their label, or where there are no labels the class that the expert gives
            them, `[tasks]`; NaN where there is neither, and for numbers.
        commonest: Part of each task's examples that get its commonest class, `[tasks]`.
        examples: Number of each task's examples, or of tokens, `[tasks]`.
    """

    objective: np.ndarray
    agreement: np.ndarray
    commonest: np.ndarray
    examples: np.ndarray

    def collapsed(self, start: "HeldOutMetrics") -> np.ndarray:
        """Finds the tasks whose predictions have fallen onto one class since the start, `[tasks]`.

        That is: nearly all examples get one class, which they did not at the start, while the
        objective went down. Under `FEWEST_TO_JUDGE` examples nothing can be said.
        """
        return (
            (self.commonest >= COLLAPSED)
            & (start.commonest < SPREAD)
            & (self.objective < start.objective)
            & (self.examples >= FEWEST_TO_JUDGE)
        )


class Control(NamedTuple):
    """The tasks that must not suffer while another is forgotten.

    Attributes:
        tasks: Position of each control task; only these are checked for a collapse.
        fraction: Learning stops before the agreement of one of these tasks falls below this part
            of what it was at the start; None for never.
    """

    tasks: tuple[int, ...]
    fraction: float | None

    def allows(self, metrics: HeldOutMetrics, start: HeldOutMetrics) -> bool:
        """Tells whether each control task is still good enough."""
        if self.fraction is None:
            return True
        chosen = list(self.tasks)
        return bool((metrics.agreement[chosen] >= self.fraction * start.agreement[chosen]).all())


class Verdict(NamedTuple):
    """The decision about some coefficients after a held-out evaluation.

    Attributes:
        is_best: True if they are the best so far.
        collapsed: The tasks whose predictions have collapsed, `[tasks]`.
        may_continue: True if the control tasks allow another step.
    """

    is_best: bool
    collapsed: np.ndarray
    may_continue: bool


def judge(
    metrics: HeldOutMetrics,
    start: HeldOutMetrics,
    best: HeldOutMetrics,
    control: Control | None = None,
) -> Verdict:
    """Compares coefficients with the starting point and with the best ones so far.

    Args:
        metrics: Those of the coefficients.
        start: Those of the starting point.
        best: Those of the best coefficients so far.
        control: The tasks that must not suffer, where something is to be forgotten.
    """
    allowed = control is None or control.allows(metrics, start)
    collapsed = metrics.collapsed(start)
    if control is not None:
        collapsed &= np.isin(np.arange(len(collapsed)), control.tasks)
    to_beat = best if metrics.examples.sum() >= FEWEST_TO_CHOOSE else start
    better = metrics.objective.sum() < to_beat.objective.sum()
    return Verdict(bool(allowed and not collapsed.any() and better), collapsed, allowed)


def held_out_floor(
    learner: Learner, calibration: Calibration, devices: Devices
) -> np.ndarray | float:
    """Returns the objective of each task on the held-out data that is perfect, `[tasks]`."""
    if learner.floor is None:
        return 0.0
    return np.sum([floor_of(learner, b.spread(devices)) for b in calibration.held_out_batches()], 0)


def floor_of(learner: Learner, batch: Batch) -> np.ndarray | float:
    """Returns the objective of each task on a batch that is perfect, `[tasks]`."""
    return 0.0 if learner.floor is None else np.asarray(learner.floor(batch.weights, batch.targets))


def evaluate_held_out(
    learner: Learner,
    state: State,
    frozen: Frozen,
    calibration: Calibration,
    devices: Devices,
    on_count: Callable[[int], Any] = lambda done: None,
) -> HeldOutMetrics:
    """Evaluates the coefficients of a state on every held-out example once.

    Args:
        learner: The compiled functions of learning.
        state: The coefficients.
        frozen: Base, deltas and heads.
        calibration: The held-out examples.
        devices: The devices of the learner.
        on_count: Told after each batch how many examples have been evaluated.
    """
    objective, evaluated = np.zeros(len(calibration.examples)), 0
    predicted: list[list[np.ndarray]] = [[] for _ in calibration.examples]
    wanted: list[list[np.ndarray]] = [[] for _ in calibration.examples]
    for batch in calibration.held_out_batches():
        evaluation = jax.device_get(learner.evaluate(state, frozen, batch.spread(devices)))
        objective += evaluation.objective
        on_count(evaluated := evaluated + int((batch.weights > 0).sum()))
        for position, (weights, targets) in enumerate(
            zip(batch.weights, batch.targets, strict=True)
        ):
            labels = targets.labels
            counted = weights > 0
            if targets.counted is not None:
                counted = counted[:, None] & targets.counted
            elif labels is not None and labels.ndim == 2:
                counted = counted[:, None] & (labels != NOT_PREDICTED)
            of_task = evaluation.predicted[position][: len(weights)]  # copies are behind them
            predicted[position].append(of_task[counted].ravel())
            if labels is not None and np.issubdtype(labels.dtype, np.floating):
                continue  # numbers agree with nothing to the last digit
            if labels is not None:
                wanted[position].append(labels[counted].ravel())
            elif targets.expert_logits is not None and targets.expert_spread is None:
                wanted[position].append(targets.expert_logits.argmax(-1)[counted].ravel())
    classes = [np.concatenate(parts) for parts in predicted]
    agreement = [
        (task_classes == np.concatenate(parts)).mean() if parts else np.nan
        for task_classes, parts in zip(classes, wanted, strict=True)
    ]
    return HeldOutMetrics(
        objective,
        np.array(agreement),
        np.array([np.bincount(task_classes).max() / len(task_classes) for task_classes in classes]),
        np.array([len(task_classes) for task_classes in classes]),
    )
