"""The console of commands and experiments, and the log lines of commands that compute."""

import logging
import os
import sys

from rich.console import Console
from rich.logging import RichHandler


def make_console(width: int = 120) -> Console:
    """Returns a console on standard output, as wide as the terminal.

    Args:
        width: Characters in a line where standard output is no terminal, such as a log file, unless
            the environment variable `COLUMNS` gives another number. Rich would cut tables there to
            80.
    """
    # No markup: names and paths may have brackets.
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return Console(markup=False)
    return Console(width=width, markup=False)


def show_log_lines(console: Console) -> None:
    """Shows warnings, those of `transformers` excepted.

    Args:
        console: The console of the command. On a terminal it shows them too, above its progress
            bar; elsewhere they go to standard error.
    """
    if not (console.is_terminal and sys.stderr.isatty()):
        console = Console(stderr=True)

    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_time=False, show_path=False)],
    )
    # Read when a command imports transformers, which warns on import where there is no PyTorch.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.set_verbosity_error()
