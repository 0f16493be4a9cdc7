"""Draws the picture of the guide on granularities: `python docs/images/granularities.py`.

Four matrices of two layers, coloured by the coefficient that the granularity gives each entry.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure

import adamerge_jax as am

SHAPES = {f"layer.{layer}.{name}.weight": (6, 8) for layer in (0, 1) for name in ("up", "down")}
"""Two layers, one above the other, of two matrices each."""

SHOWN = {
    "task": {},
    "layer": {},
    "tensor": {},
    "row": {},
    "column": {},
    "chunk": {"pieces": 4},
    "partition": {"groups": 4},
    "entry": {},
}
"""Granularities and their options."""


def coefficient_of_entries(name: str, **options: int) -> list[np.ndarray]:
    """Returns the number of the coefficient of each entry, `[6, 8]` by matrix."""
    base = {tensor: jnp.zeros(shape) for tensor, shape in SHAPES.items()}
    deltas = am.task_vectors(base, [{tensor: array + 1 for tensor, array in base.items()}])
    granularity = am.granularities.GRANULARITIES[name](SHAPES, **options)
    values = granularity.init(am.granularities.constant(SHAPES, experts=1, value=1.0))
    numbered, first = {}, 0
    for group, array in values.items():
        numbered[group] = first + jnp.arange(array.size, dtype=jnp.float32).reshape(array.shape)
        first += array.size
    prepared = {tensor: granularity.prepare(tensor, delta) for tensor, delta in deltas.items()}
    merged = am.materialize(am.mix(base, prepared, granularity.scales(numbered)))
    return [np.asarray(merged[tensor]).round().astype(int) for tensor in SHAPES]


def draw() -> Figure:
    """Returns a panel for each granularity."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06, hspace=0.06)
    axes = figure.subplots(2, 4).flat
    for axis, (name, options) in zip(axes, SHOWN.items(), strict=True):
        up_0, down_0, up_1, down_1 = coefficient_of_entries(name, **options)
        count = 1 + max(part.max() for part in (up_0, down_0, up_1, down_1))
        gap = np.full((6, 1), -1)
        image = np.vstack(
            [np.hstack([up_0, gap, down_0]), np.full((1, 17), -1), np.hstack([up_1, gap, down_1])]
        )
        # Neighbours far apart on the wheel of colours.
        hues = np.random.default_rng(2).permutation(count) / count

        colours = hsv_to_rgb(np.stack([hues, np.full(count, 0.45), np.full(count, 0.85)], -1))
        pixels = np.ones((*image.shape, 3))
        pixels[image >= 0] = colours[image[image >= 0]]
        axis.imshow(pixels, interpolation="nearest")
        count_in_words = "1 coefficient" if count == 1 else f"{count} coefficients"
        axis.set_title(f"{name}: {count_in_words}", fontsize=10)
        axis.set_axis_off()
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_suffix(".png"), dpi=130)
