"""Formulas of pages, drawn at build time: pages need no script and no font of another host.

A formula stands between two lines `$$`, in the part of LaTeX that matplotlib draws; on pages of
methods also within a line, between two `$`.
"""

import io
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from svg import in_one_line

FORMULA = re.compile(r"^\$\$\n(.+?)\n\$\$$", re.MULTILINE | re.DOTALL)
IN_A_LINE = re.compile(r"\$([^$\n]+)\$")

WITH_FORMULAS_IN_LINES = "methods/"
"""The folder of these pages: elsewhere a `$` is one of a command."""

POINTS = {"div": 13, "span": 11}
"""The size of letters: on lines of their own, and within lines about that of text."""


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Draws the formulas of a page."""

    def draw(formula: re.Match[str], element: str) -> str:
        try:
            return drawn(" ".join(formula[1].split()), element)
        except ValueError as error:
            raise PluginError(f"{page.file.src_path}: {formula[1]}: {error}") from error

    markdown = FORMULA.sub(lambda formula: draw(formula, "div"), markdown)
    if page.file.src_path.startswith(WITH_FORMULAS_IN_LINES):
        markdown = IN_A_LINE.sub(lambda formula: draw(formula, "span"), markdown)
    return markdown


def drawn(formula: str, element: str) -> str:
    """Returns a formula as a picture in HTML, in the colour of the text around it.

    Args:
        formula: The formula.
        element: The element to put it into, a key of `POINTS`.

    Raises:
        ValueError: It is not in the part of LaTeX that can be drawn.
    """
    from matplotlib import rc_context
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import math_to_image

    picture = io.BytesIO()
    chosen = {"mathtext.fontset": "cm", "svg.hashsalt": "formula", "savefig.facecolor": "none"}
    with rc_context(chosen):
        size = FontProperties(size=POINTS[element])
        depth = math_to_image(f"${formula}$", picture, prop=size, format="svg")
    attributes = f'fill="currentColor" style="vertical-align: {-depth:.1f}pt"'
    svg = in_one_line(picture.getvalue(), formula, attributes)
    return f'<{element} class="formula">{svg}</{element}>'
