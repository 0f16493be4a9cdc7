"""The progress of what counts examples: a bar for people with the time left, or a line at times."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import TextColumn

from adamerge_jax.runs.bar import make_bar

OnCount = Callable[[int], Any]
"""The function that is told how many are done."""

ShowCount = Callable[[str, int], AbstractContextManager[OnCount]]
"""The function `(words, total) -> context`, which yields the function to be told."""

SECONDS = 15.0
"""The time from a line to the next, at least, where there is no terminal."""


@contextmanager
def count_silently(words: str, total: int) -> Iterator[OnCount]:
    """Shows nothing."""
    yield lambda done: None


def count_on(console: Console) -> ShowCount:
    """Returns what shows counts on a console: bars on a terminal, lines elsewhere."""
    if not console.is_terminal:
        return CountLines(lambda line: console.print(line, highlight=False, soft_wrap=True))

    @contextmanager
    def show(words: str, total: int) -> Iterator[OnCount]:
        column = TextColumn("{task.description}", markup=False)
        bar = make_bar(column, console=console, transient=True)
        line = bar.add_task(words, total=total)
        with bar:
            yield lambda done: bar.update(line, completed=done)

    return show


class CountLines:
    """Counts in lines, `answers of base on law: 64 of 300, 0:00:40 left`, if it takes long."""

    def __init__(self, tell: Callable[[str], Any], seconds: float | None = None):
        """Starts the time to the first line.

        Args:
            tell: The function that writes a line.
            seconds: The time from a line to the next, at least; by default `SECONDS`.
        """
        self._tell = tell
        self._seconds = SECONDS if seconds is None else seconds
        self._last = time.perf_counter()

    @contextmanager
    def __call__(self, words: str, total: int) -> Iterator[OnCount]:
        """Yields the function that is told how many of all are done."""
        start = time.perf_counter()

        def on_count(done: int) -> None:
            now = time.perf_counter()
            if now - self._last < self._seconds or done == total:
                return
            self._last = now
            left = ""
            if done:
                rest = timedelta(seconds=round((now - start) / done * (total - done)))
                left = f", {rest} left"
            self._tell(f"{words}: {done} of {total}{left}")

        on_count(0)
        yield on_count


class Tally:
    """Adds up what is done in several places, and shows it where somebody looks."""

    def __init__(self) -> None:
        """Shows nothing yet."""
        self._done, self._total = 0, 0
        self._on_count: OnCount = lambda done: None

    @contextmanager
    def shown(self, show: ShowCount, words: str, total: int) -> Iterator[None]:
        """Shows what is added meanwhile.

        Args:
            show: The way to show it.
            words: The words before the numbers.
            total: The number that will be added; more than that does not count.
        """
        before = self._done, self._total, self._on_count
        with show(words, total) as on_count:
            self._done, self._total, self._on_count = 0, total, on_count
            try:
                yield
            finally:
                self._done, self._total, self._on_count = before

    def add(self, count: int) -> None:
        """Adds what has been done."""
        self._done = min(self._done + count, self._total)
        self._on_count(self._done)
