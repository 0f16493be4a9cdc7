"""Draws the picture of README: `python docs/images/quickstart.py quickstart/run/results.json`."""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

COLOURS = {
    "base": "#c9ced3",
    "task arithmetic": "#8fa3b3",
    "learned": "#00897b",
    "experts": "#37474f",
}
"""The rows to show, by how their names begin, and the colour of each."""

LABELS = {
    "task arithmetic": "task arithmetic (chosen with labels)",
    "learned": "learned, without labels (one model)",
    "experts": "experts (four models)",
}


def draw(rows: list[dict], tasks: list[str]) -> Figure:
    """Returns bars of the accuracy of each row on each task and on average."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(COLOURS)
    positions = np.append(np.arange(len(tasks)), len(tasks) + 0.3)
    for number, (name, colour) in enumerate(COLOURS.items()):
        row = next(row for row in rows if row["method"].startswith(name))
        accuracies = [100 * row["tasks"][task] for task in tasks] + [100 * row["average"]]
        bars = axes.bar(
            positions + (number - (len(COLOURS) - 1) / 2) * width,
            accuracies,
            0.92 * width,
            color=colour,
            label=LABELS.get(name, name),
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    axes.set_xticks(positions, [*tasks, "average"])
    axes.get_xticklabels()[-1].set_fontweight("bold")
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 105)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    figure.legend(loc="outside upper center", ncols=len(COLOURS), frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    rows = json.loads(Path(sys.argv[1]).read_text())["rows"]
    picture = draw(rows, list(rows[0]["tasks"]))
    picture.savefig(Path(__file__).with_suffix(".png"), dpi=200)
