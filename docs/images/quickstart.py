"""Draws the picture of README: `python docs/images/quickstart.py quickstart/run/results.json`."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure


class Bars(NamedTuple):
    """A row of the table as the picture shows it.

    Attributes:
        method: The beginning of the row's name.
        kind: The kind of the row.
        label: Its name in the legend.
        colour: The colour of its bars.
    """

    method: str
    kind: str
    label: str
    colour: str


BARS = (
    Bars("base", "baseline", "base", "#c9ced3"),
    Bars("task arithmetic", "baseline", "task arithmetic", "#a9b8c4"),
    Bars("task arithmetic", "heads", "task arithmetic, heads refitted", "#7f97a8"),
    Bars("learned", "learned", "learned, without labels (one model)", "#00897b"),
    Bars("experts", "experts", "experts (four models)", "#37474f"),
)


def draw(rows: list[dict], tasks: list[str]) -> Figure:
    """Returns bars of the accuracy of each row on each task and on average."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.add_subplot()
    width = 0.85 / len(BARS)
    positions = np.append(np.arange(len(tasks)), len(tasks) + 0.3)
    for number, shown in enumerate(BARS):
        row = next(
            row
            for row in rows
            if row["method"].startswith(shown.method) and row["kind"] == shown.kind
        )
        accuracies = [100 * row["tasks"][task] for task in tasks] + [100 * row["average"]]
        bars = axes.bar(
            positions + (number - (len(BARS) - 1) / 2) * width,
            accuracies,
            0.92 * width,
            color=shown.colour,
            label=shown.label,
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=6, padding=1)
    axes.set_xticks(positions, [*tasks, "average"])
    axes.get_xticklabels()[-1].set_fontweight("bold")
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 105)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    figure.legend(loc="outside upper center", ncols=len(BARS), frameon=False, fontsize=7.5)
    return figure


if __name__ == "__main__":
    rows = json.loads(Path(sys.argv[1]).read_text())["rows"]
    picture = draw(rows, list(rows[0]["tasks"]))
    picture.savefig(Path(__file__).with_suffix(".png"), dpi=200)
