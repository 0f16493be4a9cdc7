"""How a run shows its progress: a bar for people, JSON lines for programs."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.text import Text

from adamerge_jax.learning.learner import Progress


@contextmanager
def show_progress(
    tasks: Sequence[str],
    steps: int,
    metrics: Path,
    console: Console,
    send: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Iterator[Callable[[Progress], None]]:
    """Shows each step as it is done, and appends it to a file.

    On a terminal: a bar with the loss, the time of a step and the time left, and below it the
    objective of each task. Elsewhere: a line for every look at the held-out data.

    Args:
        tasks: Names of the tasks.
        steps: How many steps there will be.
        metrics: A JSONL file to append to, one object per step.
        console: Where to show it.
        send: Called with each of these objects too.

    Yields:
        What to call with every step's progress.
    """
    bar = Bar(
        TextColumn("learning"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    shown = bar.add_task("learning", total=steps, numbers="compiling")
    live = Live(bar, console=console)
    with (
        metrics.open("a", encoding="utf-8") as file,
        live if console.is_terminal else nullcontext(),
    ):

        def show(progress: Progress) -> None:
            seen = progress.held_out
            record = {
                "step": progress.step,
                "objective": _by_task(tasks, progress.per_task),
                "held_out": _by_task(tasks, seen and seen.objective),
                "agreement": _by_task(tasks, seen and seen.agreement),
                "seconds": round(progress.seconds, 4),
            }
            file.write(json.dumps(record) + "\n")
            file.flush()
            send(record)
            if progress.per_task is not None:
                each = zip(tasks, progress.per_task, strict=True)
                numbers = (
                    f"loss {progress.per_task.sum():.3f} {1000 * progress.seconds:.0f} ms/step"
                )
                bar.update(shown, completed=progress.step, numbers=numbers)
                live.update(
                    Group(bar, Text("  ".join(f"{task} {value:.2f}" for task, value in each)))
                )
            for task in progress.collapsed:
                part = 100 * seen.commonest[tasks.index(task)]
                console.print(
                    f"step {progress.step}: the predictions of {task} have collapsed: one class "
                    f"gets {part:.0f}% of its held-out examples while its objective falls; these "
                    "coefficients are not kept"
                )
            if seen is not None and not console.is_terminal:
                known = seen.agreement[~np.isnan(seen.agreement)]
                console.print(
                    f"step {progress.step}/{steps}: held-out loss {seen.objective.sum():.4f}"
                    + (f", agreement {100 * known.mean():.1f}%" if known.size else "")
                )

        yield show


def _by_task(tasks: Sequence[str], values: np.ndarray | None) -> dict[str, float | None] | None:
    if values is None:
        return None
    # JSON has no NaN: where there is nothing to agree with, there is no number.
    return {
        task: None if np.isnan(value) else float(value)
        for task, value in zip(tasks, values, strict=True)
    }
