"""Colours that colour-blind readers can tell apart, and that keep their order in grey print."""

import numpy as np

SEQUENTIAL = "viridis"
"""The colour map for values from little to much: even in lightness."""

SEQUENTIAL_LIGHT = "Blues"
"""The colour map for counts, most of which are 0: white there."""

DIVERGING = "PuOr"
"""The colour map for values on both sides of a middle: orange to violet, with white between."""

TRAINING, HELD_OUT, AGREEMENT = "#56b4e9", "#d55e00", "#000000"
"""The colours of curves (Okabe and Ito, Color Universal Design, 2008)."""

CATEGORIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")
"""The colours of things without an order, such as experts; of the same palette."""


def cell_style(value: float, low: float, high: float, colours: str = SEQUENTIAL) -> str:
    """Returns the CSS of a coloured cell: the value's colour, and black or white on it.

    Args:
        value: The number in the cell.
        low: Value of the first colour.
        high: Value of the last colour.
        colours: Name of a matplotlib colour map.
    """
    import matplotlib
    from matplotlib.colors import to_hex

    part = np.clip((value - low) / (high - low), 0, 1)
    red, green, blue, _ = matplotlib.colormaps[colours](part)
    return f"background:{to_hex((red, green, blue))};color:{text_on(red, green, blue)}"


def text_on(red: float, green: float, blue: float) -> str:
    """Returns black or white, whichever has the higher contrast on a colour of sRGB."""
    # Relative luminance (WCAG 2.2); from 0.179 on black has it.
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)
    ]
    return "#000" if float(np.dot([0.2126, 0.7152, 0.0722], linear)) > 0.179 else "#fff"
