"""Figures for a page that asks nobody for anything: inside it as SVG, beside it as PNG."""

import base64
import io
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from adamerge_jax.files.writing import write_whole
from adamerge_jax.report.plain_text import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOTS = 150
"""Pixels per inch of a PNG."""

_MOST_PIXELS = 6_000_000
"""Pixels of the largest PNG, which has fewer per inch: a picture of many experts is drawn whole in
memory, in several bytes a pixel."""


class Picture(NamedTuple):
    """A figure in a page.

    Attributes:
        title: Its title.
        alternative: Its content in words.
        source: A data URI.
        width: The width at which its text is readable, in CSS pixels.
    """

    title: str
    alternative: str
    source: str
    width: int


def label_text(name: str) -> str:
    """Returns a name as matplotlib draws it: short, and no formula whatever it holds."""
    return one_line(name, longest=60).replace("$", r"\$")


def picture_name(kind: str, name: str, position: int) -> str:
    """Returns the file name of a picture of something whose name comes from a file.

    Args:
        kind: The beginning of the file name.
        name: The name, which is a part of the file name where it is short and of letters, digits,
            dots, underscores and hyphens.
        position: The number that replaces any other name.
    """
    is_plain = re.fullmatch(r"\w[\w.-]{0,99}", name) is not None
    return f"{kind}-{name if is_plain else position}.png"


def write_png(figure: "Figure", file: Path) -> None:
    """Writes a matplotlib figure as a PNG file of no more than `_MOST_PIXELS`."""
    width, height = figure.get_size_inches()
    dots = min(_DOTS, math.sqrt(_MOST_PIXELS / (width * height)))
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dots)
    write_whole(file, stream.getvalue())


def save_picture(figure: "Figure", file: Path, title: str, alternative: str) -> Picture:
    """Writes a figure as a PNG file, and returns it as a picture for a page.

    Args:
        figure: A matplotlib figure.
        file: The PNG to write.
        title: The picture's title.
        alternative: The picture's content in words, for those who do not see it.
    """
    import matplotlib

    write_png(figure, file)
    # Laid out for the file, and as slow to lay out as to draw.
    figure.set_layout_engine("none")
    stream = io.BytesIO()
    # The same figure gives the same bytes: no date, no random names inside.
    with matplotlib.rc_context({"svg.hashsalt": "adamerge_jax"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(stream.getvalue()).decode()
    width = round(96 * figure.get_figwidth())
    return Picture(title, alternative, f"data:image/svg+xml;base64,{encoded}", width)
