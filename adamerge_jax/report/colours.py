"""Colours that colour-blind readers can tell apart, and that keep their order in grey print."""

import matplotlib
import numpy as np
from matplotlib.colors import to_hex

SEQUENTIAL = "viridis"
"""For values from little to much: even in lightness."""

DIVERGING = "PuOr"
"""For values on both sides of 0."""

TRAINING, HELD_OUT, AGREEMENT = "#56b4e9", "#d55e00", "#000000"
"""Of curves (Okabe and Ito, Color Universal Design, 2008)."""


def cell_style(value: float, low: float, high: float, colours: str = SEQUENTIAL) -> str:
    """The CSS of a coloured cell: the value's colour, and black or white on it.

    Args:
        value: What the cell holds.
        low: Value of the first colour.
        high: Value of the last colour.
        colours: Name of a matplotlib colour map.
    """
    part = np.clip((value - low) / (high - low), 0, 1)
    red, green, blue, _ = matplotlib.colormaps[colours](part)
    # Relative luminance (WCAG 2.2); from 0.179 on black has the higher contrast.
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)
    ]
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    text = "#000" if luminance > 0.179 else "#fff"
    return f"background:{to_hex((red, green, blue))};color:{text}"
