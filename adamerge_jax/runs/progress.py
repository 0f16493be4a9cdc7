"""The progress of learning: a bar for people, JSON lines for programs."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import TextColumn
from rich.text import Text

from adamerge_jax.runs.bar import make_bar
from adamerge_jax.runs.folder import ByTask, StepRecord

if TYPE_CHECKING:
    from adamerge_jax.learning.loop import Progress


SECONDS = 30.0
"""The time from a line to the next where there is no terminal and no held-out evaluation."""


@contextmanager
def show_progress(
    tasks: Sequence[str],
    steps: int,
    metrics: Path,
    console: Console,
    on_record: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Iterator[Callable[["Progress"], None]]:
    """Shows each step as it is done, and appends it to a file.

    On a terminal: a bar with the loss, the time of a step and the time left, and below it the
    objective of each task. Elsewhere: a line for every evaluation of the held-out data, and for a
    step whenever there was none for `SECONDS`; with the time left.

    Args:
        tasks: Names of the tasks.
        steps: The number of steps to come.
        metrics: A JSONL file to append to, one object per step.
        console: The console to show it on.
        on_record: Called with each of these objects too.

    Yields:
        `on_step`, to be called with every step's progress.
    """
    bar = make_bar(TextColumn("learning"), TextColumn("{task.fields[numbers]}"))
    line = bar.add_task("learning", total=steps, numbers="compiling")
    live = Live(bar, console=console)
    first: tuple[int, float] | None = None  # a step and its time
    last_line = time.perf_counter()

    def update_bar(progress: "Progress") -> None:
        numbers = f"loss {progress.per_task.sum():.3f} {1000 * progress.seconds:.0f} ms/step"
        bar.update(line, completed=progress.step, numbers=numbers)
        objectives = zip(tasks, progress.per_task, strict=True)
        text = "  ".join(f"{task} {value:.2f}" for task, value in objectives)
        live.update(Group(bar, Text(text)))

    with (
        metrics.open("a", encoding="utf-8") as file,
        live if console.is_terminal else nullcontext(),
    ):

        def time_left(step: int) -> str:
            """Returns the time left by the steps that this process has taken."""
            first_step, start = first
            taken = step - first_step
            if not taken or step >= steps:
                return ""
            seconds = (time.perf_counter() - start) / taken * (steps - step)
            rest = timedelta(seconds=round(seconds))
            return f", {rest} left"

        def print_line(progress: "Progress", words: str) -> None:
            nonlocal last_line
            last_line = time.perf_counter()
            left = time_left(progress.step)
            console.print(f"step {progress.step}/{steps}: {words}{left}")

        def on_step(progress: "Progress") -> None:
            nonlocal first
            first = first or (progress.step, time.perf_counter())
            record = as_record(tasks, progress)._asdict()
            file.write(json.dumps(record) + "\n")
            file.flush()
            on_record(record)
            if progress.per_task is not None:
                update_bar(progress)
            for task in progress.collapsed:
                part = 100 * progress.held_out.commonest[tasks.index(task)]
                console.print(
                    f"step {progress.step}: the predictions of {task} have collapsed: one class "
                    f"gets {part:.0f}% of its held-out examples while its objective falls; these "
                    "coefficients are not kept"
                )
            if console.is_terminal:
                return
            if progress.held_out is not None:
                agreement = progress.held_out.agreement
                measured = agreement[~np.isnan(agreement)]
                loss = progress.held_out.objective.sum()
                agreed = f", agreement {100 * measured.mean():.1f}%" if measured.size else ""
                print_line(progress, f"held-out loss {loss:.4f}{agreed}")
            elif progress.per_task is not None and time.perf_counter() - last_line >= SECONDS:
                print_line(progress, f"loss {progress.per_task.sum():.4f}")

        yield on_step


def as_record(tasks: Sequence[str], progress: "Progress") -> StepRecord:
    """Returns the line of `metrics.jsonl` for a step."""

    def by_task(values: np.ndarray | None) -> ByTask | None:
        if values is None:
            return None
        # JSON has no NaN: where there is nothing to agree with, there is no number.
        numbers = (None if np.isnan(value) else float(value) for value in values)
        return dict(zip(tasks, numbers, strict=True))

    held_out = progress.held_out
    return StepRecord(
        progress.step,
        by_task(progress.per_task),
        by_task(held_out and held_out.objective),
        by_task(held_out and held_out.agreement),
        round(progress.seconds, 4),
    )
