"""What people look at: the table of results, the map of coefficients, the model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from rich.console import Console
from rich.table import Table

from adamerge_jax.coefficients import Coefficients
from adamerge_jax.evaluation import Row
from adamerge_jax.granularities import layer_of

_COLOURS = "viridis"  # even in lightness, and told apart by colour-blind readers


def results_table(rows: Sequence[Row]) -> Table:
    """Scores: one line per method, one column per task, the average last.

    The last row is the merge that the run learned and stands out.
    """
    table = Table(title=_TITLES[rows[0].metric], title_style="bold")
    # A method may be called by a long path: that is broken into lines, numbers never are.
    table.add_column("method", overflow="fold")
    for task in rows[0].tasks:
        table.add_column(task, justify="right", no_wrap=True)
    table.add_column("average", justify="right", style="bold", no_wrap=True)
    for row in rows:
        cells = [*row.tasks.values(), row.average]
        table.add_row(
            row.method,
            *(_in_words(cell, row.metric) for cell in cells),
            style="bold green" if row is rows[-1] else None,
        )
    return table


_TITLES = {"accuracy": "Accuracy (%)", "loss": "Loss (nats per token)"}


def _in_words(score: float, metric: str) -> str:
    return f"{100 * score:.1f}" if metric == "accuracy" else f"{score:.3f}"


def write_results(rows: Sequence[Row], path: Path) -> None:
    """Writes the table as JSON.

    That is `{"rows": [{"method", "metric", "tasks": {task: score}, "average"}]}`.
    """
    path.write_text(json.dumps({"rows": [row.as_json() for row in rows]}, indent=2) + "\n")


def draw_coefficients(coefficients: Coefficients, path: Path) -> None:
    """Draws how much of each expert goes where, as a PNG.

    Coarse coefficients: one map, groups down and experts across. One coefficient per tensor, or
    finer: one map per expert of each tensor's mean, layers down and the kinds of tensors across.
    """
    means = {g: own.reshape(len(own), -1).mean(1) for g, own in coefficients.values.items()}
    every = np.stack(list(means.values()))
    # From 0 to 1, or as far as the means of groups go beyond.
    low, high = min(0.0, float(every.min())), max(1.0, float(every.max()))
    figure = draw_means(
        means,
        coefficients.names,
        by_tensor=set(coefficients.values) == set(coefficients.shapes),
        colours=_COLOURS,
        limits=(low, high),
        label="coefficient",
    )
    figure.suptitle(f"Merge coefficients ({coefficients.granularity})", fontsize=11)
    figure.savefig(path, dpi=150)


def draw_means(
    means: Mapping[str, Float[np.ndarray, " K"]],
    experts: Sequence[str],
    *,
    by_tensor: bool,
    colours: str,
    limits: tuple[float, float],
    label: str,
) -> Figure:
    """Draws one number per group and expert.

    Args:
        means: By group, `[K]`.
        experts: The K experts.
        by_tensor: Whether groups are tensors: then there is one map per expert, layers down and
            the kinds of tensors across; otherwise one map, groups down and experts across.
        colours: A colour map of Matplotlib.
        limits: The numbers at its two ends.
        label: What the numbers are.
    """
    if by_tensor:
        maps, rows, columns = _by_layer_and_kind(means)
        across = 2 if len(experts) == 4 else min(len(experts), 3)
        down = -(-len(experts) // across)
        cell = 0.24
        size = (
            across * (cell * len(columns) + 0.4) + 3.2,
            down * (cell * len(rows) + 0.5) + 2.2,
        )
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
        for axis, name, values in zip(axes, experts, maps, strict=False):
            image = _draw_map(axis, values, colours, limits)
            axis.set_title(name, fontsize=9)
            axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
            axis.set_yticks(range(len(rows)), rows, fontsize=7)
        for axis in axes[len(experts) :]:
            axis.set_axis_off()
    else:
        groups = sorted(means, key=_natural_order)
        values = np.stack([means[group] for group in groups])
        size = (0.7 * len(experts) + 3.4, 0.3 * len(groups) + 1.6)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        image = _draw_map(axes, values, colours, limits)
        axes.set_xticks(range(len(experts)), experts, rotation=30, ha="right", fontsize=8)
        axes.set_yticks(range(len(groups)), groups, fontsize=8)
        for row, column in np.ndindex(*values.shape):
            red, green, blue, _ = image.to_rgba(values[row, column])
            colour = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
            text = f"{values[row, column]:.2f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes, label=label, shrink=0.8)
    return figure


def print_coefficients(coefficients: Coefficients, console: Console) -> None:
    """Prints where the coefficients come from and, layer by layer, their mean per expert."""
    fields = {
        "base": coefficients.base.source,
        "experts": ", ".join(f"{e.name} ({e.source})" for e in coefficients.experts),
        "coefficients": sum(values.size for values in coefficients.values.values()),
        "granularity": coefficients.granularity,
        "interference": _interference_in_words(coefficients) or "none",
        "constraint": coefficients.constraint,
        "objective": coefficients.objective,
        "learned in": f"{coefficients.step} steps, seed {coefficients.seed}",
        "started from": coefficients.started_from or "nothing learned before",
        "scaled since": _scaled_in_words(coefficients) or "no",
        "merged tensors": len(coefficients.parameters),
    }
    for name, field in fields.items():
        console.print(f"{name:14} {field}", highlight=False, soft_wrap=True)
    layers: dict[str, list[np.ndarray]] = {}
    for group, values in coefficients.values.items():
        layers.setdefault(layer_of(group, coefficients.values), []).append(values)
    table = Table(title="Mean coefficient")
    table.add_column("layer", no_wrap=True)
    for expert in coefficients.experts:
        table.add_column(expert.name, justify="right")
    for layer in sorted(layers, key=_natural_order):
        means = np.mean([values.reshape(len(values), -1).mean(1) for values in layers[layer]], 0)
        table.add_row(layer, *(f"{mean:.3f}" for mean in means))
    console.print(table)


def _draw_map(
    axis: Axes, values: np.ndarray, colours: str, limits: tuple[float, float]
) -> AxesImage:
    colour_map = matplotlib.colormaps[colours].with_extremes(bad="#dddddd")
    low, high = limits
    return axis.imshow(values, cmap=colour_map, vmin=low, vmax=high, aspect="auto")


def _by_layer_and_kind(
    means: Mapping[str, np.ndarray],
) -> tuple[np.ndarray, list[str], list[str]]:
    """Means of tensors as one map `[K, layers, kinds]`; NaN where there is none."""
    names = list(means)
    places = {}
    for name in names:
        layer = layer_of(name, names)
        places[name] = layer, name.removeprefix(layer).lstrip(".") or layer
    rows = sorted({layer for layer, _ in places.values()}, key=_natural_order)
    blocks = [row for row in rows if row.rpartition(".")[2].isdigit()]
    of_blocks = [kind for layer, kind in places.values() if layer in blocks]
    others = [kind for layer, kind in places.values() if layer not in blocks]
    columns = list(dict.fromkeys(sorted(of_blocks) + sorted(others)))
    maps = np.full((len(means[names[0]]), len(rows), len(columns)), np.nan)
    for name, (layer, kind) in places.items():
        maps[:, rows.index(layer), columns.index(kind)] = means[name]
    return maps, rows, columns


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Sorts `layer.10` after `layer.9`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _interference_in_words(coefficients: Coefficients) -> str:
    """The interference steps with their options: `trim (density 0.2), elect_sign`."""
    words = []
    for step in coefficients.interference:
        options = ", ".join(f"{name} {value}" for name, value in step.options.items())
        words.append(f"{step.name} ({options})" if options else step.name)
    return ", ".join(words)


def _scaled_in_words(coefficients: Coefficients) -> str:
    """What coefficients were multiplied with after learning: `trec times 0.5`."""
    return ", ".join(f"{name} times {factor:g}" for name, factor in coefficients.scaled.items())


def model_card(coefficients: Coefficients, rows: Sequence[Row]) -> str:
    """A README.md for the merged checkpoint, with the Hub's metadata."""
    table = ""
    if rows:
        tasks = list(rows[0].tasks)
        lines = [["method", *tasks, "average"], ["---"] * (len(tasks) + 2)]
        for row in rows:
            scores = [*row.tasks.values(), row.average]
            lines.append([row.method, *(_in_words(score, row.metric) for score in scores)])
        table = f"\n## {_TITLES[rows[0].metric]}\n\n" + "\n".join(
            f"| {' | '.join(line)} |" for line in lines
        )
    experts = "\n".join(f"- {expert.name}: `{expert.source}`" for expert in coefficients.experts)
    count = sum(values.size for values in coefficients.values.values())
    steps = _interference_in_words(coefficients)
    interference = f" Task vectors were changed before mixing: {steps}." if steps else ""
    factors = _scaled_in_words(coefficients)
    scaled = f" Multiplied after learning: {factors}." if factors else ""
    return f"""---
tags:
- merge
- adamerge_jax
---

# Merged model

One checkpoint of `{coefficients.base.source}` and {len(coefficients.experts)} experts,
merged by adamerge_jax.

Experts:

{experts}

Coefficients: {count}, one per {coefficients.granularity} and expert, constraint
{coefficients.constraint}, learned by minimising {coefficients.objective} (seed
{coefficients.seed}, best after {coefficients.step} steps).{interference}{scaled}
{table}
"""
