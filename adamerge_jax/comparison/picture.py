"""The picture of a comparison: each method's average with its interval and its seeds."""

from typing import TYPE_CHECKING

import numpy as np

from adamerge_jax.comparison.summary import Comparison, MethodSummary
from adamerge_jax.report.colours import CATEGORIES
from adamerge_jax.report.pictures import label_text
from adamerge_jax.report.results import TITLES
from adamerge_jax.runs.rows import SHARES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = dict(zip(("learned", "baseline", "heads"), CATEGORIES, strict=False))
_LABELS = {
    "learned": "learned",
    "baseline": "without learning",
    "heads": "heads alone fitted",
}


def draw_comparison(comparison: Comparison) -> "Figure":
    """Draws one line per method, the best on top, and the base and the experts as vertical lines.

    Args:
        comparison: The results.
    """
    from matplotlib.figure import Figure

    methods = [summary for summary in comparison.methods if summary.seeds]
    figure = Figure(figsize=(8, 1.4 + 0.3 * len(methods)), layout="constrained")
    axes = figure.subplots()
    scale = 100 if comparison.metric in SHARES else 1
    for summary in comparison.methods:
        if not summary.seeds:
            style = "-" if summary.kind == "experts" else ":"
            axes.axvline(
                scale * summary.average.mean,
                color="#666666",
                linestyle=style,
                linewidth=1.2,
                label=label_text(summary.name),
            )
    labelled: set[str] = set()
    for position, summary in enumerate(methods):
        label = None if summary.kind in labelled else _LABELS[summary.kind]
        labelled.add(summary.kind)
        _draw_method(axes, position, summary, scale, label)
    axes.set_yticks(range(len(methods)), [label_text(summary.name) for summary in methods])
    axes.set_ylim(max(len(methods), 1) - 0.5, -0.5)
    title = f"{TITLES[comparison.metric]}, average over tasks"
    marks = "bars: 95% interval over test data; caps: standard deviation over seeds"
    axes.set_xlabel(f"{title}\n{marks}", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", color="#dddddd", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    return figure


def _draw_method(
    axes: "Axes", position: int, summary: MethodSummary, scale: float, label: str | None
) -> None:
    colour, mean = _COLOURS[summary.kind], scale * summary.average.mean
    if not np.isfinite(mean):
        return
    score = summary.standing and summary.standing.score
    if score is not None and score.interval is not None:
        low, high = (scale * end for end in score.interval)
        axes.plot([low, high], [position, position], "-", color=colour, linewidth=2, alpha=0.5)
    if summary.average.deviation is not None:
        reach = scale * summary.average.deviation
        axes.errorbar(mean, position, xerr=reach, color=colour, capsize=3, linewidth=1)
    axes.plot([mean], [position], "o", color=colour, markersize=5, label=label)
