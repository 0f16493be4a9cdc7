"""Coefficients to look at: heat maps of where each expert goes, and their means by layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from rich.console import Console
from rich.table import Table

from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.coefficients.granularities import layer_of
from adamerge_jax.report.colours import SEQUENTIAL


def draw_coefficients(coefficients: Coefficients, path: Path) -> None:
    """Draws how much of each expert goes where, as a PNG.

    Coarse coefficients: one map, groups down and experts across. One coefficient per tensor, or
    finer: one map per expert of each tensor's mean, layers down and the kinds of tensors across.
    """
    figure = draw_means(
        _group_means(coefficients),
        coefficients.names,
        by_tensor=set(coefficients.values) == set(coefficients.shapes),
        colours=SEQUENTIAL,
        limits=value_range(coefficients),
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


def draw_expert(coefficients: Coefficients, position: int) -> Figure | None:
    """Draws how much of one expert goes where, narrow enough to be read on a phone.

    Layers across, the kinds of tensors down, the mean of each tensor's coefficients; or None where
    coefficients are coarser than tensors.

    Args:
        coefficients: Of all experts.
        position: Of the expert.
    """
    if set(coefficients.values) != set(coefficients.parameters):
        return None
    maps, layers, kinds = _by_layer_and_kind(_group_means(coefficients))
    size = (0.24 * len(layers) + 3.2, 0.2 * len(kinds) + 1.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = _draw_map(axes, maps[position].T, SEQUENTIAL, value_range(coefficients))
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=8)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, label="mean coefficient")
    bar.ax.tick_params(labelsize=8)
    return figure


def print_coefficients(coefficients: Coefficients, console: Console) -> None:
    """Prints where the coefficients come from and, layer by layer, their mean per expert."""
    fields = {
        "base": coefficients.base.source,
        "experts": ", ".join(f"{e.name} ({e.source})" for e in coefficients.experts),
        "coefficients": sum(values.size for values in coefficients.values.values()),
        "granularity": coefficients.granularity,
        "interference": interference_in_words(coefficients) or "none",
        "constraint": coefficients.constraint,
        "objective": coefficients.objective,
        "learned in": f"{coefficients.step} steps, seed {coefficients.seed}",
        "started from": coefficients.started_from or "nothing learned before",
        "scaled since": scaled_in_words(coefficients) or "no",
        "merged tensors": len(coefficients.parameters),
    }
    for name, field in fields.items():
        console.print(f"{name:14} {field}", highlight=False, soft_wrap=True)
    layers, means = layer_means(coefficients)
    table = Table(title="Mean coefficient")
    table.add_column("layer", no_wrap=True)
    for expert in coefficients.experts:
        table.add_column(expert.name, justify="right")
    for layer, row in zip(layers, means, strict=True):
        table.add_row(layer, *(f"{mean:.3f}" for mean in row))
    console.print(table)


def layer_means(coefficients: Coefficients) -> tuple[list[str], Float[np.ndarray, "layers K"]]:
    """How much of each expert goes into each layer: the mean over its groups of coefficients."""
    layers: dict[str, list[np.ndarray]] = {}
    for group, values in coefficients.values.items():
        layers.setdefault(layer_of(group, coefficients.values), []).append(_group_mean(values))
    names = sorted(layers, key=_natural_order)
    return names, np.stack([np.mean(layers[name], axis=0) for name in names])


class Spread(NamedTuple):
    """How the coefficients of one expert are spread.

    Attributes:
        mean: Of all its coefficients.
        deviation: Their standard deviation.
        smallest: The smallest.
        largest: The largest.
    """

    mean: float
    deviation: float
    smallest: float
    largest: float


def spreads(coefficients: Coefficients) -> list[Spread]:
    """How the coefficients of each expert are spread, one line per expert."""
    found = []
    for position in range(len(coefficients.experts)):
        own = np.concatenate([values[position].ravel() for values in coefficients.values.values()])
        found.append(Spread(*(float(f(own)) for f in (np.mean, np.std, np.min, np.max))))
    return found


def _group_means(coefficients: Coefficients) -> dict[str, Float[np.ndarray, " K"]]:
    return {group: _group_mean(values) for group, values in coefficients.values.items()}


def _group_mean(values: Float[np.ndarray, "K ..."]) -> Float[np.ndarray, " K"]:
    return values.reshape(len(values), -1).mean(1)


def _draw_map(
    axis: Axes, values: np.ndarray, colours: str, limits: tuple[float, float]
) -> AxesImage:
    colour_map = matplotlib.colormaps[colours].with_extremes(bad="#dddddd")
    low, high = limits
    return axis.imshow(values, cmap=colour_map, vmin=low, vmax=high, aspect="auto")


def value_range(coefficients: Coefficients) -> tuple[float, float]:
    """From 0 to 1, or as far as the means of groups go beyond."""
    means = np.array([_group_mean(values) for values in coefficients.values.values()])
    return min(0.0, float(means.min())), max(1.0, float(means.max()))


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


def interference_in_words(coefficients: Coefficients) -> str:
    """The interference steps with their options: `trim (density 0.2), elect_sign`."""
    words = []
    for step in coefficients.interference:
        options = ", ".join(f"{name} {value}" for name, value in step.options.items())
        words.append(f"{step.name} ({options})" if options else step.name)
    return ", ".join(words)


def scaled_in_words(coefficients: Coefficients) -> str:
    """What coefficients were multiplied with after learning: `trec times 0.5`."""
    return ", ".join(f"{name} times {factor:g}" for name, factor in coefficients.scaled.items())
