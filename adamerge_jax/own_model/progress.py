"""The line that shows how far a merge is, in a terminal and in a notebook."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import TextColumn

from adamerge_jax.learning.loop import Progress
from adamerge_jax.runs.bar import make_bar

OnStep = Callable[[Progress], None]


@contextmanager
def show_line(steps: int, console: Console) -> Iterator[OnStep]:
    """Shows a line with the steps, the loss and the time left, where somebody is to see it.

    Args:
        steps: The number of steps to come.
        console: The console to show it on.

    Yields:
        `on_step`, to be called with every step's progress.
    """
    if console.is_jupyter and not console.quiet:
        yield _notebook_line(steps)
        return
    if console.quiet or not console.is_terminal:
        yield lambda progress: None
        return
    with make_bar(TextColumn("merging"), TextColumn("{task.fields[loss]}"), console=console) as bar:
        line = bar.add_task("merging", total=steps, loss="compiling")

        def on_step(progress: Progress) -> None:
            if progress.per_task is not None:
                loss = f"loss {progress.per_task.sum():.3f}"
                bar.update(line, completed=progress.step, loss=loss)

        yield on_step


def _notebook_line(steps: int) -> OnStep:
    """Returns a function that keeps one line of a notebook's cell up to date.

    The bar of `rich` needs widgets there, which not every notebook has.
    """
    from IPython.display import display

    def text(words: str) -> dict[str, str]:
        return {"text/plain": words}

    handle = display(text(f"merging: step 0 of {steps}, compiling"), raw=True, display_id=True)
    started = shown = time.monotonic()

    def on_step(progress: Progress) -> None:
        nonlocal started, shown
        now = time.monotonic()
        if progress.step <= 1:  # it holds the compilation
            started = now
        if progress.per_task is None or (now - shown < 0.5 and progress.step != steps):
            return
        shown = now
        words = f"merging: step {progress.step} of {steps}, loss {progress.per_task.sum():.3f}"
        if 1 < progress.step < steps:
            left = (now - started) / (progress.step - 1) * (steps - progress.step)
            words += f", {int(left) // 60}:{int(left) % 60:02} left"
        handle.update(text(words), raw=True)

    return on_step
