"""Pictures of Matplotlib as parts of a page."""

import html
import re

_LEFT_OUT = re.compile(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", re.DOTALL)


def in_one_line(picture: bytes, label: str, attributes: str = "") -> str:
    """Returns an SVG as one line of HTML: without ends of lines Markdown takes it as it is.

    Args:
        picture: The SVG file that Matplotlib has written.
        label: The words for those who do not see it.
        attributes: Further attributes of the element.
    """
    svg = picture.decode()
    svg = _LEFT_OUT.sub("", svg[svg.index("<svg") :])
    described = f'<svg role="img" aria-label="{html.escape(label, quote=True)}"'
    return " ".join(svg.replace("<svg", f"{described} {attributes}", 1).split())
