"""The picture of a front: what one task costs another."""

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from adamerge_jax.report.colours import CATEGORIES, HELD_OUT, SEQUENTIAL
from adamerge_jax.report.pictures import label_text
from adamerge_jax.runs.front import Front, non_dominated

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_IN_PAIRS = 3
"""The largest number of tasks that are drawn in pairs; more are drawn side by side."""

_SINGLE, _OTHER, _EXPERT = "#555555", "#c8c8c8", "#777777"


def draw_front(front: Front) -> "Figure":
    """Draws the points of a front among all merges that were measured.

    Two or three tasks: a panel for each pair. More: a line for each point over all tasks. Numbers
    are those of the coefficients files.
    """
    if len(front.tasks) <= MOST_IN_PAIRS and len(front.tasks) > 1:
        return _draw_pairs(front)
    return _draw_lines(front)


def _percent(front: Front) -> tuple[float, str]:
    """Returns the factor and the unit in which scores are shown."""
    return (
        (100.0, " (%)") if front.score in ("accuracy", "exact match", "recall at 1") else (1.0, "")
    )


def _draw_pairs(front: Front) -> "Figure":
    from matplotlib.figure import Figure

    pairs = list(combinations(front.tasks, 2))
    figure = Figure(figsize=(4.9 if len(pairs) == 1 else 14.4, 4.5), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(pairs)))
    for axes, (across, up) in zip(panels, pairs, strict=True):
        third = next((task for task in front.tasks if task not in (across, up)), None)
        _draw_pair(axes, front, across, up, third)
    handles, labels = panels[0].get_legend_handles_labels()
    columns = 2 if len(pairs) == 1 else len(labels)
    figure.legend(
        handles, labels, loc="outside upper center", ncols=columns, fontsize=8, frameon=False
    )
    return figure


def _draw_pair(axes: "Axes", front: Front, across: str, up: str, third: str | None) -> None:
    """Draws the scores of two tasks against each other, and that of a third one as colours."""
    import matplotlib
    from matplotlib.colors import Normalize

    factor, unit = _percent(front)

    def pairs_of(scores: Sequence[dict[str, float]]) -> Float[np.ndarray, "N 2"]:
        rows = [(of_merge[across], of_merge[up]) for of_merge in scores]
        return factor * np.array(rows, np.float64).reshape(-1, 2)

    others = pairs_of(front.others)
    axes.plot(*others.T, "o", color=_OTHER, markersize=3, label="other merges", zorder=1)
    line = dict(color=_EXPERT, linestyle="--", linewidth=1)
    axes.axvline(factor * front.experts[across], **line, label="experts, one model each")
    axes.axhline(factor * front.experts[up], **line)
    singles = pairs_of([scores for _, scores in front.singles])
    axes.plot(
        *singles.T, "-", color=_SINGLE, linewidth=1, zorder=2, label="one coefficient for all"
    )
    value, scores = front.best_single
    axes.plot(
        *pairs_of([scores])[0],
        "D",
        markerfacecolor="none",  # it may be a point of the front
        markeredgecolor=_SINGLE,
        markersize=17,
        zorder=3,
    )
    words = f"the best of these ({value:g})"
    axes.plot([], [], "D", markerfacecolor="none", color=_SINGLE, markersize=7, label=words)
    points = pairs_of([point.scores for point in front.points])
    sign = 1 if front.maximise else -1
    # Of all merges: the chosen points are some of it, and some that the third task asks for.
    measured = np.concatenate([points, singles, others])
    edge = measured[non_dominated(sign * measured)]
    edge = edge[np.argsort(edge[:, 0])]
    axes.step(
        *edge.T,
        where="pre" if front.maximise else "post",
        color=CATEGORIES[0],
        linewidth=1.6,
        zorder=4,
        label="front" if third is None else "front of these two tasks alone",
    )
    ring = dict(markeredgecolor=HELD_OUT, markeredgewidth=2.4)
    axes.plot([], [], "o", color="white", markersize=11, label="best on average", **ring)
    colours = [matplotlib.colors.to_rgba(CATEGORIES[0])] * len(points)
    if third is not None:
        values = factor * np.array([point.scores[third] for point in front.points])
        scale = matplotlib.cm.ScalarMappable(
            Normalize(values.min(), values.max() + 1e-9), SEQUENTIAL
        )
        colours = [scale.to_rgba(value) for value in values]
        bar = axes.figure.colorbar(scale, ax=axes, pad=0.02, aspect=30)
        bar.ax.set_title(label_text(third), fontsize=8, loc="right")
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)
    for position, ((x, y), (red, green, blue, _)) in enumerate(zip(points, colours, strict=True)):
        is_best = position == front.best
        axes.plot(
            x,
            y,
            "o",
            color=(red, green, blue),
            markersize=15,
            zorder=6 if is_best else 5,
            **(ring if is_best else dict(markeredgecolor="white")),
        )
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        axes.annotate(
            str(position + 1),
            (x, y),
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if dark else "black",
            weight="bold",
            zorder=7 if is_best else 5.5,
        )
    axes.set_xlabel(f"{label_text(across)}{unit}", fontsize=9)
    axes.set_ylabel(f"{label_text(up)}{unit}", fontsize=9)
    _finish(axes)
    axes.margins(0.08)


def _draw_lines(front: Front) -> "Figure":
    import matplotlib
    from matplotlib.figure import Figure

    factor, unit = _percent(front)
    tasks = front.tasks
    figure = Figure(figsize=(max(5.0, 1.5 * len(tasks) + 2.5), 4.6), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(tasks))

    def row(scores: dict[str, float]) -> Float[np.ndarray, " T"]:
        return factor * np.array([scores[task] for task in tasks])

    for position, scores in enumerate(front.others):
        label = "other merges" if position == 0 else None
        axes.plot(places, row(scores), color=_OTHER, linewidth=0.5, zorder=1, label=label)
    axes.plot(
        places,
        row(front.experts),
        "_",
        color="black",
        markersize=22,
        markeredgewidth=1.6,
        zorder=5,
        label="experts, one model each",
    )
    value, scores = front.best_single
    axes.plot(
        places,
        row(scores),
        "--D",
        color=_SINGLE,
        linewidth=1.6,
        markersize=4,
        zorder=4,
        label=f"the best one coefficient for all, {value:g}",
    )
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(front.points)))
    ends = np.array([row(point.scores)[-1] for point in front.points])
    heights = _apart(ends, 0.045 * (np.ptp([*ends, *row(front.experts)]) or 1))
    for position, point in enumerate(front.points):
        is_best = position == front.best
        axes.plot(
            places,
            row(point.scores),
            "-o",
            color=HELD_OUT if is_best else colours[position],
            linewidth=2.6 if is_best else 1.3,
            markersize=4,
            zorder=4 if is_best else 3,
            label="the point that is best on average" if is_best else None,
        )
        axes.annotate(
            str(position + 1),
            (places[-1], ends[position]),
            (places[-1] + 0.12, heights[position]),
            va="center",
            fontsize=8,
            color=HELD_OUT if is_best else colours[position],
            weight="bold",
            arrowprops=dict(arrowstyle="-", color="#bbbbbb", linewidth=0.5),
        )
    axes.set_xticks(places, [label_text(task) for task in tasks], fontsize=9)
    axes.set_ylabel(f"{front.score}{unit}", fontsize=9)
    axes.set_xlim(-0.25, len(tasks) - 1 + 0.35)
    _finish(axes)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    return figure


def _apart(heights: Float[np.ndarray, " N"], least: float) -> Float[np.ndarray, " N"]:
    """Returns heights of labels that lie at least so far apart, in the order of what they name."""
    order = np.argsort(heights, kind="stable")
    placed = heights[order].astype(np.float64)
    for position in range(1, len(placed)):
        placed[position] = max(placed[position], placed[position - 1] + least)
    placed -= (placed - heights[order]).mean()
    result = np.empty_like(placed)
    result[order] = placed
    return result


def _finish(axes: "Axes") -> None:
    axes.tick_params(labelsize=8)
    axes.grid(color="#e6e6e6", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
