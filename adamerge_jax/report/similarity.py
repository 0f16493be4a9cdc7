"""How alike the task vectors are, drawn: cosines between experts, over all and layer by layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from adamerge_jax.report.colours import DIVERGING


def cosine_range(matrices: Sequence[Sequence[Sequence[float | None]]]) -> float:
    """The largest cosine between two different experts, without its sign; at least 0.1.

    Colours reach from minus this to plus this: all that is of interest is near 0.
    """
    found = [
        abs(value)
        for matrix in matrices
        for row, values in enumerate(matrix)
        for column, value in enumerate(values)
        if row != column and value is not None
    ]
    return max([0.1, *found])


def draw_similarity(similarity: Mapping[str, Any]) -> Figure:
    """Draws a matrix of cosines for all merged parameters together and one for each layer.

    Args:
        similarity: As `run.json` has it.
    """
    experts = similarity["experts"]
    matrices = {"all layers": similarity["cosines"]} | {
        layer: own["cosines"] for layer, own in similarity["layers"].items()
    }
    limit = cosine_range(list(matrices.values()))
    across = min(4, len(matrices))
    down = -(-len(matrices) // across)
    side = 0.26 * len(experts) + 0.5
    figure = Figure(figsize=(across * side + 2.4, down * (side + 0.3) + 1.2), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    colours = matplotlib.colormaps[DIVERGING].with_extremes(bad="#dddddd")
    for axis, (title, matrix) in zip(axes, matrices.items(), strict=False):
        values = np.array(matrix, float)  # null becomes NaN
        np.fill_diagonal(values, np.nan)
        image = axis.imshow(values, cmap=colours, vmin=-limit, vmax=limit)
        axis.set_title(title, fontsize=7)
        axis.set_xticks(range(len(experts)), experts, rotation=90, fontsize=7)
        axis.set_yticks(range(len(experts)), experts, fontsize=7)
    for axis in axes[len(matrices) :]:
        axis.set_axis_off()
    figure.colorbar(image, ax=axes, label="cosine", shrink=0.8)
    figure.suptitle("Similarity of the task vectors", fontsize=10)
    return figure
