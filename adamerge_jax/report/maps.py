"""Heat maps: one number for every group of coefficients and expert, or for every pair of experts.

Matplotlib is imported when something is drawn.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.report.coefficients import (
    by_layer_and_kind,
    moved_means,
    natural_order,
    range_around_start,
    start_of,
)
from adamerge_jax.report.colours import DIVERGING, text_on
from adamerge_jax.report.comparison import Comparison
from adamerge_jax.report.pictures import label_text, write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


def draw_coefficients(coefficients: Coefficients, path: Path) -> None:
    """Draws `coefficients_figure` as a PNG."""
    write_png(coefficients_figure(coefficients), path)


def coefficients_figure(coefficients: Coefficients) -> "Figure":
    """Returns a picture of how much of each expert goes where.

    Coarse coefficients: one map, groups down and experts across. One coefficient per tensor, or
    finer: one map per expert of each tensor's mean, layers down and the kinds of tensors across.
    White is the start; grey is where there is nothing, or all stayed at the start.

    Args:
        coefficients: The coefficients of K experts.

    Returns:
        A figure of Matplotlib, which notebooks show and `savefig` writes.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> import adamerge_jax as am
        >>> base = {"kernel": jnp.zeros((2, 2))}
        >>> experts = [{"kernel": jnp.eye(2)}, {"kernel": -jnp.eye(2)}]
        >>> data = [np.ones((20, 2), np.float32)] * 2
        >>> def forward(parameters, inputs):
        ...     return inputs @ parameters["kernel"]
        >>> merged = am.merge(base, experts, forward, data, steps=2, progress=False)
        >>> figure = am.coefficients_figure(merged.coefficients)
        >>> figure.get_suptitle()
        'Merge coefficients (column)'
    """
    means = moved_means(coefficients)
    figure = draw_means(
        means,
        coefficients.names,
        by_tensor=set(coefficients.values) == set(coefficients.shapes),
        colours=DIVERGING,
        limits=range_around_start(coefficients, np.stack(list(means.values()))),
        label=f"coefficient (white: {start_of(coefficients):g})",
    )
    title = label_text(f"Merge coefficients ({coefficients.granularity})")
    figure.suptitle(title, fontsize=11)
    return figure


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Draws where the second file gives more of an expert and where less, as a PNG.

    The colours are white at 0 and as strong on one side as on the other.
    """
    largest = max(float(np.abs(change).max()) for change in comparison.differences.values())
    largest = largest or 1.0
    figure = draw_means(
        comparison.differences,
        [expert.name for expert in comparison.experts],
        by_tensor=comparison.by_tensor,
        colours=DIVERGING,
        limits=(-largest, largest),
        label="change",
    )
    figure.suptitle("Coefficients, second file less first", fontsize=11)
    write_png(figure, path)


def draw_means(
    means: Mapping[str, Float[np.ndarray, " K"]],
    experts: Sequence[str],
    *,
    by_tensor: bool,
    colours: str,
    limits: tuple[float, float],
    label: str,
) -> "Figure":
    """Draws one number per group and expert.

    Args:
        means: The numbers by group.
        experts: Names of the K experts.
        by_tensor: True where groups are tensors: then there is one map per expert, layers down and
            the kinds of tensors across; otherwise one map, groups down and experts across.
        colours: A colour map of Matplotlib.
        limits: The numbers at its two ends.
        label: The meaning of the numbers.
    """
    if by_tensor:
        maps, rows, columns = by_layer_and_kind(means)
        across = 2 if len(experts) == 4 else min(len(experts), 3)
        down = -(-len(experts) // across)
        cell = 0.24
        width = across * (cell * len(columns) + 0.4) + 3.2
        height = down * (cell * len(rows) + 0.5) + 2.2
        figure, axes = _grid(down, across, width, height)
        for axis, name, values in zip(axes, experts, maps, strict=False):
            image = _draw_map(axis, values, colours, limits)
            axis.set_title(label_text(name), fontsize=9)
            axis.set_xticks(range(len(columns)), _label_texts(columns), rotation=90, fontsize=7)
            axis.set_yticks(range(len(rows)), _label_texts(rows), fontsize=7)
        for axis in axes[len(experts) :]:
            axis.set_axis_off()
    else:
        groups = sorted(means, key=natural_order)
        values = np.stack([means[group] for group in groups])
        figure, axes = _grid(1, 1, 0.7 * len(experts) + 3.4, 0.3 * len(groups) + 1.6)
        image = _draw_map(axes[0], values, colours, limits)
        axes[0].set_xticks(
            range(len(experts)), _label_texts(experts), rotation=30, ha="right", fontsize=8
        )
        axes[0].set_yticks(range(len(groups)), _label_texts(groups), fontsize=8)
        for row, column in np.ndindex(*values.shape):
            if np.isnan(values[row, column]):
                continue
            colour = text_on(*image.to_rgba(values[row, column])[:3])
            text = f"{values[row, column]:.2f}"
            axes[0].text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes, label=label, shrink=0.8)
    return figure


def draw_expert(coefficients: Coefficients, position: int) -> "Figure | None":
    """Draws how much of one expert goes where, narrow enough to be read on a phone.

    Layers across, the kinds of tensors down, the mean of each tensor's coefficients.

    Args:
        coefficients: The coefficients of all experts.
        position: The expert's position among them.

    Returns:
        None where coefficients are coarser than tensors.
    """
    if set(coefficients.values) != set(coefficients.parameters):
        return None
    maps, layers, kinds = by_layer_and_kind(moved_means(coefficients))
    figure, axes = _grid(1, 1, 0.24 * len(layers) + 3.2, 0.2 * len(kinds) + 1.6)
    limits = range_around_start(coefficients, maps)
    image = _draw_map(axes[0], maps[position].T, DIVERGING, limits)
    axes[0].set_xticks(range(len(layers)), _label_texts(layers), rotation=90, fontsize=8)
    axes[0].set_yticks(range(len(kinds)), _label_texts(kinds), fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, label="mean coefficient")
    bar.ax.tick_params(labelsize=8)
    return figure


def draw_similarity(similarity: Mapping[str, Any]) -> "Figure":
    """Draws a matrix of cosines for all merged parameters together and one for each layer.

    Args:
        similarity: The similarity of the task vectors, as `run.json` has it.
    """
    experts = similarity["experts"]
    matrices = {"all layers": similarity["cosines"]} | {
        layer: numbers["cosines"] for layer, numbers in similarity["layers"].items()
    }
    limit = cosine_range(list(matrices.values()))
    across = min(4, len(matrices))
    down = -(-len(matrices) // across)
    side = 0.26 * len(experts) + 0.5
    beside = 0.06 * max(map(len, _label_texts(experts)))
    width, height = across * side + 2.0 + beside, down * (side + 0.3) + 0.9 + beside
    figure, axes = _grid(down, across, width, height)
    for axis, (title, matrix) in zip(axes, matrices.items(), strict=False):
        values = np.array(matrix, float)  # null becomes NaN
        np.fill_diagonal(values, np.nan)
        image = _draw_map(axis, values, DIVERGING, (-limit, limit), aspect="equal")
        axis.set_title(label_text(title), fontsize=7)
        axis.set_xticks(range(len(experts)), _label_texts(experts), rotation=90, fontsize=7)
        axis.set_yticks(range(len(experts)), _label_texts(experts), fontsize=7)
    for axis in axes[len(matrices) :]:
        axis.set_axis_off()
    figure.colorbar(image, ax=axes, label="cosine", shrink=0.8)
    figure.suptitle("Similarity of the task vectors", fontsize=10)
    return figure


def cosine_range(matrices: Sequence[Sequence[Sequence[float | None]]]) -> float:
    """Returns the largest cosine between two different experts, without its sign; at least 0.1.

    Colours reach from minus this to plus this: all that is of interest is near 0.
    """
    cosines = [
        abs(value)
        for matrix in matrices
        for row, values in enumerate(matrix)
        for column, value in enumerate(values)
        if row != column and value is not None
    ]
    return max([0.1, *cosines])


def _label_texts(names: Sequence[str]) -> list[str]:
    return [label_text(name) for name in names]


def _grid(down: int, across: int, width: float, height: float) -> tuple["Figure", Sequence["Axes"]]:
    """Returns an empty figure of a size in inches, and its axes row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()


def _draw_map(
    axis: "Axes",
    values: np.ndarray,
    colours: str,
    limits: tuple[float, float],
    aspect: str = "auto",
) -> "AxesImage":
    import matplotlib

    colour_map = matplotlib.colormaps[colours].with_extremes(bad="#dddddd")
    low, high = limits
    return axis.imshow(values, cmap=colour_map, vmin=low, vmax=high, aspect=aspect)
