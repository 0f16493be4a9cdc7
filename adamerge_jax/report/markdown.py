"""Text of strangers in Markdown, where it must not become a link, an image, HTML or a heading."""

import re

from markupsafe import Markup

from adamerge_jax.report.plain_text import one_line

_PLAIN = re.compile(
    r"""
    -?\d+(\.\d+)?%?                               # a number
    |
    (?!\d+[.)])                                   # no beginning of a numbered list
    [^\W_]                                        # a letter or a digit
    (
        [^\W_]|[ ,()%+=-]
        |\.(?=\d)                                # no dot as in www.example.org
        |(?<=[^\W_])_(?=[^\W_])                   # within a word
    )*
    """,
    re.VERBOSE,
)
"""Texts that mean nothing in Markdown, wherever they stand."""


def in_markdown(value: object) -> Markup:
    """Returns a value for a paragraph, a list or a cell of a table, as the text that it is.

    Whatever could mean something in Markdown or HTML becomes a code span, in which nothing does.
    What is `Markup` already stays as it is.
    """
    if isinstance(value, Markup):
        return value
    text = one_line(str(value))
    return Markup(text) if not text or _PLAIN.fullmatch(text) else code_span(text)


def code_span(value: object) -> Markup:
    """Returns a value as a code span that its text cannot leave.

    The fence is longer than any row of backticks in the text. A bar, which would end the cell of a
    table even here, is shown as a broken one.
    """
    text = one_line(str(value)).replace("|", "\N{BROKEN BAR}")
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return Markup(f"{fence}{space}{text}{space}{fence}")
