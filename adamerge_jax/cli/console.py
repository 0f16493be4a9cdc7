"""The console of commands and experiments: progress, results and log lines."""

import logging
import os
import sys

from rich.console import Console
from rich.text import Text


def make_console(width: int = 120, *, quiet: bool = False) -> Console:
    """Returns a console on standard output, as wide as the terminal.

    Args:
        width: Characters in a line where standard output is no terminal, such as a log file, unless
            the environment variable `COLUMNS` gives another number. Rich would cut tables there to
            80.
        quiet: If True, the console shows nothing.
    """
    # No markup: names and paths may have brackets.
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return Console(markup=False, quiet=quiet)
    return Console(width=width, markup=False, quiet=quiet)


def show_log_lines(console: Console, *, verbose: bool = False) -> None:
    """Shows warnings, those of `transformers` excepted; Python's own and those of all libraries.

    Args:
        console: The console of the command. On a terminal it shows them too, above its progress
            bar; elsewhere they go to standard error.
        verbose: If True, what libraries log beside warnings is shown too, with time and origin.
    """
    if console.quiet or not (console.is_terminal and sys.stderr.isatty()):
        console = Console(stderr=True, markup=False)
    root = logging.getLogger()
    # A library that logs while it is imported, as Orbax does, has by then set up Python's default.
    for handler in list(root.handlers):
        if isinstance(handler, _ConsoleHandler) or type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
    root.addHandler(_ConsoleHandler(console, verbose))
    root.setLevel(logging.INFO if verbose else logging.WARNING)
    logging.captureWarnings(True)
    if verbose:
        return
    # Read when a command imports transformers, which warns on import where there is no PyTorch.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.set_verbosity_error()


class _ConsoleHandler(logging.Handler):
    """Prints log records as lines of a console: `warning: ...`."""

    def __init__(self, console: Console, verbose: bool) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s" if verbose else ""))

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record; it is not cut into lines, so that it can be searched for."""
        line = f"{record.levelname.lower()}: {self.format(record).rstrip()}"
        style = "yellow" if record.levelno >= logging.WARNING else ""
        self._console.print(Text(line, style), soft_wrap=True)
