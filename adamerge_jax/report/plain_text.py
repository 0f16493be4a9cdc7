"""Text of strangers as plain text: names, licences and options that files and recipes bring."""

LONGEST = 200
"""The largest number of characters that are shown of such a text."""


def one_line(text: str, longest: int = LONGEST) -> str:
    r"""Returns a text on one line, without invisible characters, cut where it is very long.

    Line breaks, control characters (a terminal would obey them) and marks that turn the direction
    of writing become spaces.

    Args:
        text: Any text.
        longest: The largest number of characters to show.

    Examples:
        >>> from adamerge_jax.report.plain_text import one_line
        >>> one_line("mit\n---\n# Free")
        'mit --- # Free'
    """
    shown = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}\N{HORIZONTAL ELLIPSIS}"
