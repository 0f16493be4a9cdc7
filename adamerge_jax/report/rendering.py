"""Filling in the templates of this room, which escape every value."""

import json
import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from adamerge_jax.report.markdown import code_span, in_markdown
from adamerge_jax.report.plain_text import one_line

_LONGEST_WORD = 24
"""The number of characters behind which a word may be broken into lines wherever it is."""


def render(template: str, **values: Any) -> str:
    """Fills in a template.

    Values are escaped for the language that the template's file name ends with: HTML or Markdown.
    Only what is `Markup` already is taken as it is.

    Args:
        template: Its file name.
        **values: The values that it names, all of which must be there.
    """
    return _environment(template.endswith(".html.jinja")).get_template(template).render(values)


@cache
def _environment(is_html: bool) -> Environment:
    """Returns what fills in templates of HTML or of Markdown, with those that it has compiled."""
    environment = Environment(
        loader=PackageLoader("adamerge_jax", "report"),
        autoescape=True,
        finalize=_printable if is_html else in_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not is_html,
    )
    environment.filters["breakable"] = _breakable
    environment.filters["code"] = code_span
    environment.filters["python_string"] = _python_string
    return environment


def _printable(value: Any) -> Any:
    """Returns a text without control characters and marks of direction; others as they are."""
    if not isinstance(value, str) or value.isprintable():
        return value
    shown = "".join(c if c.isprintable() or c == "\n" else " " for c in value)
    return Markup(shown) if isinstance(value, Markup) else shown


def _breakable(name: str) -> Markup:
    """Returns a name or a path that may be broken into lines behind dots and slashes.

    Long words may be broken anywhere, so that none makes a page wider than its screen. Numbers are
    not broken at their points.
    """
    words = []
    for word in one_line(name).split(" "):
        parts = re.split(r"(?<=[_/])|(?<=\.)(?<!\d\.)|(?<=\.)(?=\D)", word)
        short = [piece for part in parts for piece in re.findall(f".{{1,{_LONGEST_WORD}}}", part)]
        words.append(Markup("<wbr>").join(escape(piece) for piece in short))
    return Markup(" ").join(words)


def _python_string(text: str) -> Markup:
    """Returns a text as a string of Python, for a block of code."""
    return Markup(json.dumps(one_line(text), ensure_ascii=False))
