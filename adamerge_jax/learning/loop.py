"""The loop around the compiled step."""

import dataclasses
import itertools
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from adamerge_jax.coefficients.granularities import Values
from adamerge_jax.data.batches import Calibration
from adamerge_jax.devices import ONE_DEVICE, Devices
from adamerge_jax.errors import NonFiniteObjectiveError
from adamerge_jax.heads.learned import Heads
from adamerge_jax.learning.held_out import (
    Control,
    HeldOutMetrics,
    evaluate_held_out,
    floor_of,
    held_out_floor,
    judge,
)
from adamerge_jax.learning.learner import Frozen, Learner, State
from adamerge_jax.stopping import stop_asked, stopped


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of learning after a step.

    Attributes:
        step: Number of optimizer steps taken.
        per_task: The objective of each task on the step's batch, before the step, `[tasks]`, less
            its floor; None at step 0.
        held_out: The held-out metrics after the step, the objective less its floor; None if they
            were not evaluated.
        seconds: Wall-clock time of the step, compilation included where there was one.
        collapsed: Tasks whose predictions have fallen onto one class.
        best: The coefficients after this step, if they are the best so far.
    """

    step: int
    per_task: np.ndarray | None
    held_out: HeldOutMetrics | None
    seconds: float
    collapsed: tuple[str, ...] = ()
    best: "Learned | None" = None


class Learned(NamedTuple):
    """The coefficients that the held-out calibration data chose.

    Attributes:
        values: Coefficients by group, `[G, K, ...]`.
        step: The number of steps after which they were reached; 0 is the starting point.
        held_out: Their held-out metrics.
        heads: The learned parameters of each task's head, by name; empty where heads are kept.

    Examples:
        >>> import numpy as np
        >>> from adamerge_jax import Learned
        >>> from adamerge_jax.learning.held_out import HeldOutMetrics
        >>> tasks = np.array([0.1, 0.2])
        >>> metrics = HeldOutMetrics(tasks, agreement=tasks, commonest=tasks, examples=tasks)
        >>> learned = Learned({"all": np.array([[0.3, 0.7]])}, step=40, held_out=metrics)  # [G, K]
        >>> learned.step, learned.values["all"].shape
        (40, (1, 2))
    """

    values: Values
    step: int
    held_out: HeldOutMetrics
    heads: Heads = ()


class Snapshot(NamedTuple):
    """The point that learning has reached, with all that is needed to go on from it.

    Attributes:
        state: After `step` steps.
        step: Number of optimizer steps taken.
        start: The held-out metrics of the starting point.
        best: The best coefficients so far.
        ended: True if there is no step left to take.
    """

    state: State
    step: int
    start: HeldOutMetrics
    best: Learned
    ended: bool

    @classmethod
    def like(cls, learner: Learner, initial: Values, heads: Heads = ()) -> "Snapshot":
        """Returns one of the same structure as those of a learner, its leaves without meaning."""
        metrics = HeldOutMetrics(*np.zeros((4, 1)))
        state = learner.init(initial, heads)
        return cls(state, 0, metrics, Learned(initial, 0, metrics, state.heads), False)


def learn(
    learner: Learner,
    frozen: Frozen,
    initial: Values,
    calibration: Calibration,
    *,
    steps: int,
    evaluate_every: int,
    control: Control | None = None,
    on_step: Callable[[Progress], Any] = lambda progress: None,
    on_best: Callable[[Learned], Any] = lambda learned: None,
    on_snapshot: Callable[[Snapshot], Any] = lambda snapshot: None,
    should_stop: Callable[[], bool] = stop_asked,
    resume: Snapshot | None = None,
    devices: Devices = ONE_DEVICE,
    report: Callable[[Progress], Any] | None = None,
    save: Callable[[Snapshot], Any] | None = None,
) -> Learned:
    """Runs the steps and keeps the coefficients that do best on the held-out data.

    Where under `FEWEST_TO_CHOOSE` examples are held out, chance would decide which step does best:
    there the last ones that are better than the start are kept. Coefficients under which a task's
    predictions have collapsed onto one class are never kept: their objective is low for the wrong
    reason.

    Args:
        learner: How coefficients are learned.
        frozen: Base, deltas and heads.
        initial: The coefficients to start from, `[G, K, ...]` by group.
        calibration: Batches to learn from and to choose by.
        steps: Number of optimizer steps.
        evaluate_every: Steps between two evaluations of the held-out data; the start and the end
            are always evaluated.
        control: The tasks that must not suffer, where something is to be forgotten.
        on_step: Called with each step's `Progress`, and once before the first step.
        on_best: Called with the starting point, then with all coefficients that are the best so
            far.
        on_snapshot: Called after every evaluation of the held-out data with a snapshot to go on
            from.
        should_stop: Asked after every step. Where it returns True, `on_snapshot` is called with
            this step's snapshot, and learning ends with `Stopped`.
        resume: The last snapshot of an earlier call with the same arguments; its steps are not
            taken again, and `on_step` is not called for them.
        devices: Those of the learner.
        report: The old name of `on_step`.
        save: The old name of `on_snapshot`.

    Returns:
        The best coefficients by their objective on the held-out data, which is never above that of
        the starting point. That says nothing of other measures, such as accuracy.

    Raises:
        NonFiniteObjectiveError: Says at which step and on which task; carries the last good
            coefficients.
        Stopped: `should_stop` has returned True, by default since a signal came.

    Examples:
        The classifier of `make_learner`'s example, from data to the merged parameters:

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> import optax
        >>> from adamerge_jax import CONSTRAINTS, ArrayExamples, Frozen, calibrate, granularities
        >>> from adamerge_jax import learn, make_learner, materialize, mix, objectives, task_vectors
        >>> base = {"kernel": jnp.ones((3, 2))}
        >>> experts = [{"kernel": base["kernel"].at[:, c].add(1.0)} for c in range(2)]
        >>> def forward(parameters, heads, inputs):
        ...     logits = inputs["x"] @ materialize(parameters)["kernel"]
        ...     return [objectives.TaskOutputs(task_logits) for task_logits in jnp.split(logits, 2)]
        >>> deltas = task_vectors(base, experts)
        >>> shapes = granularities.shapes_of(base, deltas)
        >>> granularity = granularities.tensor(shapes)
        >>> initial = granularity.init(granularities.constant(shapes, experts=2, value=0.3))
        >>> learned = learn(
        ...     make_learner(
        ...         forward,
        ...         granularity,
        ...         CONSTRAINTS["clip"],
        ...         objectives.cross_entropy(),
        ...         optax.adam(0.1),
        ...     ),
        ...     Frozen(base, deltas, heads=()),
        ...     initial,
        ...     calibrate(
        ...         {
        ...             task: ArrayExamples({"x": np.ones((10, 3))}, labels=np.zeros(10, int))
        ...             for task in ("one", "other")
        ...         },
        ...         batch_size=4,
        ...         held_out=0.2,
        ...         seed=0,
        ...     ),
        ...     steps=4,
        ...     evaluate_every=2,
        ... )
        >>> print(learned.values["kernel"].round(1))  # [G, K]: all examples are of class 0
        [[0.7 0. ]]
        >>> merged = materialize(mix(base, deltas, granularity.scales(learned.values)))
        >>> merged["kernel"].shape
        (3, 2)
    """
    if report is not None or save is not None:
        warnings.warn(
            "learn: report and save are now on_step and on_snapshot",
            DeprecationWarning,
            stacklevel=2,
        )
        on_step, on_snapshot = report or on_step, save or on_snapshot
    if resume is not None and resume.ended:
        return resume.best
    tasks = list(calibration.examples)
    first_state = learner.init(initial, frozen.heads) if resume is None else resume.state
    state = devices.replicate(first_state)
    best = None if resume is None else resume.best

    def require_finite(per_task: np.ndarray, step: int, where: str) -> None:
        for task, value in zip(tasks, per_task, strict=True):
            if not np.isfinite(value):
                raise NonFiniteObjectiveError(
                    f"step {step}, task {task!r}: the objective on {where} is {value}; "
                    "lower the learning rate, or look for extreme values in this expert",
                    best,
                )

    def evaluate(step: int) -> HeldOutMetrics:
        metrics = evaluate_held_out(learner, state, frozen, calibration, devices)
        require_finite(metrics.objective, step, "the held-out data")
        return metrics

    def keep(step: int, metrics: HeldOutMetrics) -> None:
        nonlocal best
        values, heads = jax.device_get((learner.coefficients(state), state.heads))
        best = Learned(values, step, metrics, heads)
        on_best(best)

    def stop_if_asked(snapshot: Snapshot, *, is_kept: bool) -> None:
        if should_stop():
            if not is_kept:
                on_snapshot(snapshot)
            raise stopped()

    floor = held_out_floor(learner, calibration, devices)

    def shown(metrics: HeldOutMetrics) -> HeldOutMetrics:
        return dataclasses.replace(metrics, objective=metrics.objective - floor)

    if resume is None:
        began = time.perf_counter()
        start, taken = evaluate(0), 0
        keep(0, start)
        on_step(Progress(0, None, shown(start), time.perf_counter() - began, best=best))
        on_snapshot(first := Snapshot(state, 0, start, best, ended=False))
        stop_if_asked(first, is_kept=True)
    else:
        start, taken = resume.start, resume.step
    batches = calibration.batches(taken)
    for step, batch in zip(range(taken + 1, steps + 1), batches, strict=False):
        began = time.perf_counter()
        batch = batch.spread(devices)
        state, per_task = learner.step(state, frozen, batch)
        per_task = np.asarray(per_task)
        seconds = time.perf_counter() - began
        require_finite(per_task, step, "the step's batch")
        per_task = per_task - floor_of(learner, batch)
        if step % evaluate_every and step != steps:
            on_step(Progress(step, per_task, None, seconds))
            stop_if_asked(Snapshot(state, step, start, best, ended=False), is_kept=False)
            continue
        metrics = evaluate(step)
        is_best, fallen, may_continue = judge(metrics, start, best.held_out, control)
        if is_best:
            keep(step, metrics)
        collapsed = tuple(itertools.compress(tasks, fallen))
        better = best if is_best else None
        on_step(Progress(step, per_task, shown(metrics), seconds, collapsed, better))
        ended = step == steps or not may_continue
        on_snapshot(snapshot := Snapshot(state, step, start, best, ended))
        stop_if_asked(snapshot, is_kept=True)
        if ended:
            break
    return best
