"""The progress of a search: a bar for people with the time left, or a line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

from rich.console import Console
from rich.progress import TextColumn

from adamerge_jax.runs.bar import make_bar
from adamerge_jax.runs.evaluations import Evaluation

_LINES = 10
"""The number of lines, but for better scores, where there is no terminal."""


@contextmanager
def show_evaluations(
    total: int, console: Console, describe: Callable[[Evaluation], str]
) -> Iterator[Callable[[Evaluation], None]]:
    """Shows each merge as it is scored.

    On a terminal: a bar with the time left. Elsewhere: a line for every tenth of all.

    Args:
        total: The number of merges that will be scored.
        console: The console to show it on.
        describe: The text beside the bar after an evaluation, such as the best score so far.

    Yields:
        `on_evaluation`, to be called with every evaluation that was made in this process.
    """
    bar = make_bar(
        TextColumn("scoring merges"), TextColumn("{task.fields[words]}"), console=console
    )
    line = bar.add_task("", total=total, words="")
    started, first = time.perf_counter(), 0

    with bar if console.is_terminal else nullcontext():

        def on_evaluation(evaluation: Evaluation) -> None:
            nonlocal first
            number, words = evaluation.number, describe(evaluation)
            first = first or number
            bar.update(line, completed=number, words=words)
            if console.is_terminal or (number % max(1, total // _LINES) and number != total):
                return
            seconds_each = (time.perf_counter() - started) / (number - first + 1)
            left = timedelta(seconds=round(seconds_each * (total - number)))
            console.print(
                f"evaluation {number}/{total}: {words}, {left} left",
                highlight=False,
                soft_wrap=True,
            )

        yield on_evaluation
