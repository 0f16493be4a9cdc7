"""The curve of a search: the score of every merge, and the best so far."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from adamerge_jax.report.colours import HELD_OUT, TRAINING
from adamerge_jax.runs.evaluations import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LARGEST_DRAWN = 1e30
"""The largest size of a score in a picture, which has a finite extent."""


def draw_scores(evaluations: Sequence[Evaluation], words: str, maximise: bool) -> "Figure":
    """Draws the score of each merge in its order, and the best score so far as a line of steps.

    Args:
        evaluations: The evaluations, whose scores are at most `LARGEST_DRAWN` in size.
        words: The name of the score.
        maximise: True where more is better.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.0), layout="constrained")
    axes = figure.subplots()
    for phase, label, marker, colour in (
        ("single", "one coefficient for all", "s", "#888888"),
        ("search", "searched", "o", TRAINING),
    ):
        of_phase = [(e.number, e.score) for e in evaluations if e.phase == phase]
        if of_phase:
            axes.plot(*zip(*of_phase, strict=True), marker, color=colour, markersize=3, label=label)
    if evaluations:
        numbers = np.array([e.number for e in evaluations])
        values = [e.score for e in evaluations]
        best = (np.maximum if maximise else np.minimum).accumulate(values)
        at = int(np.flatnonzero(best == best[-1])[0])
        axes.step(numbers, best, where="post", color=HELD_OUT, linewidth=1.4, label="best so far")
        axes.plot(numbers[at], best[at], "*", color=HELD_OUT, markersize=11, zorder=3)
        axes.annotate(
            f"{best[at]:.4g}",
            (numbers[at], best[at]),
            (0, 8 if maximise else -14),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=HELD_OUT,
        )
        axes.margins(y=0.14)
    axes.set_xlabel("evaluation", fontsize=8)
    axes.set_ylabel(words, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, fontsize=7, frameon=False)
    return figure
