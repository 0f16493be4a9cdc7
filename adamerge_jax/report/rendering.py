"""Filling in the templates of this room."""

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


def render(template: str, *, html: bool, **values: Any) -> str:
    """Fills in a template.

    Args:
        template: Its file name.
        html: True to escape every value for HTML.
        **values: The values that it names, all of which must be there.
    """
    environment = Environment(
        loader=PackageLoader("adamerge_jax", "report"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not html,
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template(template).render(values)


def _breakable(name: str) -> Markup:
    """Returns a dotted name or a path that may be broken into lines behind dots and slashes."""
    return Markup(re.sub(r"([._/])", r"\1<wbr>", str(escape(name))))
