"""Pictures of measured tables, drawn at build time."""

import io
import re
from collections.abc import Mapping, Sequence

from svg import in_one_line

_GREY, _OTHERS, _SHOWN = "#7d858c", "#b9c0c6", "#00897b"
"""Colours that are legible on light and on dark pages."""


def score_line(titles: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> str | None:
    """Returns a line of a table's scores as an SVG: one method among all others.

    Args:
        titles: The titles of the columns, that of the scores `average`, `own heads` or
            `loss`.
        rows: The cells of the rows.
        name: The method that stands out; the base and the experts have names, too.

    Returns:
        One line of HTML; None for a table without such a column, or with a single score.
    """
    column = next(
        (i for i, title in enumerate(titles) if title in ("average", "own heads", "loss")), None
    )
    if column is None:
        return None
    scores = {row[0]: _number(row[column]) for row in rows}
    known = {method: score for method, score in scores.items() if score is not None}
    if len(known) < 3 or not any(f"`{name}`" in method for method in known):
        return None
    return _drawn(known, name, titles[0])


def _number(cell: str) -> float | None:
    """Returns the first number of a cell; None if it has none."""
    match = re.match(r"\**(-?\d+(?:\.\d+)?)", cell)
    return None if match is None else float(match[1])


def _drawn(scores: Mapping[str, float], name: str, axis_label: str) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "chart", "font.size": 9, "text.color": _GREY}):
        figure = Figure(figsize=(6.8, 1.25), layout="constrained")
        axes = figure.add_subplot()
        named = {
            label: score
            for method, score in scores.items()
            if (label := _label(method, name)) is not None
        }
        axes.scatter(list(scores.values()), [0] * len(scores), s=26, color=_OTHERS, zorder=2)
        for label, score in named.items():
            is_shown = label == name
            colour = _SHOWN if is_shown else _GREY
            axes.scatter([score], [0], s=70 if is_shown else 34, color=colour, zorder=3)
            place = {"xytext": (0, 11 if is_shown else -20), "textcoords": "offset points"}
            axes.annotate(f"{label} {score:g}", (score, 0), ha="center", color=colour, **place)
        low, high = min(scores.values()), max(scores.values())
        margin = 0.09 * (high - low)
        axes.set(xlim=(low - margin, high + margin), ylim=(-1, 1), yticks=[])
        axes.set_xlabel(axis_label.replace("average ", ""), color=_GREY)
        axes.tick_params(colors=_GREY)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(_OTHERS)
        picture = io.BytesIO()
        figure.savefig(picture, format="svg", transparent=True)
    words = ", ".join(f"{label} {score:g}" for label, score in named.items())
    svg = in_one_line(picture.getvalue(), f"{words}, among {len(scores)} rows of the table")
    return f'<div class="chart">{svg}</div>'


def _label(method: str, name: str) -> str | None:
    """Returns the label of a row that has one."""
    if f"`{name}`" in method:
        return name
    if method == "base":
        return "base"
    return "experts" if method.startswith("experts (one") else None
