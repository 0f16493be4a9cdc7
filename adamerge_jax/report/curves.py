"""Learning curves: each task's objective and held-out agreement from step to step."""

from typing import TYPE_CHECKING

from adamerge_jax.report.colours import AGREEMENT, HELD_OUT, TRAINING
from adamerge_jax.runs.folder import ByTask, Stage, StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


ALL_TASKS = "all tasks"
"""The title of the curves of the sum over tasks, which is what learning minimises."""


def summed(stage: Stage) -> Stage:
    """Returns the steps with the sum over tasks of the objective, as that of one task.

    The held-out agreement is the mean over the tasks that have one.
    """

    def total(values: ByTask | None) -> ByTask | None:
        return None if values is None else {ALL_TASKS: sum(v for v in values.values() if v)}

    def mean(values: ByTask | None) -> ByTask | None:
        given = [value for value in (values or {}).values() if value is not None]
        return None if values is None else {ALL_TASKS: sum(given) / len(given) if given else None}

    return [
        record._replace(
            objective=total(record.objective),
            held_out=total(record.held_out),
            agreement=mean(record.agreement),
        )
        for record in stage
    ]


def draw_curves(stage: Stage, task: str, best: StepRecord | None) -> "Figure":
    """Draws the learning curves of one task, small enough for the width of a phone.

    Above: the objective on each step's batch and on the held-out data. Below, where it is known:
    the held-out agreement. A dotted line marks the step whose coefficients were kept.

    Args:
        stage: The steps.
        task: The task.
        best: The step whose coefficients were kept, if one was.
    """
    from matplotlib.figure import Figure

    agreement = [(r.step, r.agreement[task]) for r in stage if r.agreement is not None]
    agreement = [(step, 100 * value) for step, value in agreement if value is not None]
    trained = [(r.step, r.objective[task]) for r in stage if r.objective is not None]
    held_out = [(r.step, r.held_out[task]) for r in stage if r.held_out is not None]
    figure = Figure(figsize=(3.6, 3.4 if agreement else 2.3), layout="constrained")
    if agreement:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        below.plot(*zip(*agreement, strict=True), "s-", color=AGREEMENT, markersize=3, linewidth=1)
        below.set_ylabel("agreement (%)", fontsize=8)
        _finish(below, best)
    else:
        axes = below = figure.subplots()
    if trained:
        line = dict(color=TRAINING, linewidth=1)
        axes.plot(*zip(*trained, strict=True), "-", label="on the step's batch", **line)
    if held_out:
        line = dict(color=HELD_OUT, linewidth=1.2, markersize=3.5)
        axes.plot(*zip(*held_out, strict=True), "o--", label="held out", **line)
    axes.set_ylabel("objective", fontsize=8)
    _finish(axes, best, f"kept: step {best.step}" if best is not None else None)
    # Outside, where it hides no curve.
    figure.legend(loc="outside upper center", ncols=3, fontsize=7, frameon=False)
    below.set_xlabel("step", fontsize=8)
    return figure


def _finish(axes: "Axes", best: StepRecord | None, label: str | None = None) -> None:
    if best is not None:
        axes.axvline(best.step, color="#666666", linestyle=":", linewidth=1.2, label=label)
    axes.tick_params(labelsize=7)
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
