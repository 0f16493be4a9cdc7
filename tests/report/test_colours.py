import re

import numpy as np
import pytest

from adamerge_jax.report.colours import DIVERGING, SEQUENTIAL, cell_style


def luminance(colour: str) -> float:
    """Relative luminance of `#rgb` or `#rrggbb` (WCAG 2.2)."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = np.array([int(digits[at : at + 2], 16) for at in (0, 2, 4)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("colours", [SEQUENTIAL, DIVERGING])
def test_the_text_of_a_cell_can_be_read(colours):
    """At least the contrast of 4.5 that WCAG asks of small text, for every value."""
    backgrounds = []
    for value in np.linspace(-2, 2, 41):
        style = cell_style(value, -1.5, 1.5, colours)
        background, text = re.fullmatch(r"background:(#\w+);color:(#\w+)", style).groups()
        light, dark = sorted([luminance(background), luminance(text)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5
        backgrounds.append(luminance(background))
    if colours == SEQUENTIAL:
        assert backgrounds == sorted(backgrounds)  # more is lighter, in grey print too
