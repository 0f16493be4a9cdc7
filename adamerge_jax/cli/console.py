"""Where commands print."""

import os
import sys

from rich.console import Console


def make_console(width: int = 120) -> Console:
    """Standard output, as wide as the terminal.

    Args:
        width: Of what is no terminal, such as a log file, in characters, unless the environment
            variable `COLUMNS` says otherwise. Rich would cut tables there to 80.
    """
    # No markup: names and paths may have brackets.
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return Console(markup=False)
    return Console(width=width, markup=False)
