"""What each task of a merge loses without each of its experts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from rich.table import Table
from rich.text import Text

from adamerge_jax.report.colours import DIVERGING, cell_style
from adamerge_jax.report.grids import Cell, Grid, Line
from adamerge_jax.report.plain_text import one_line
from adamerge_jax.runs.rows import SHARES, Metric, Row

_NOTHING = "\N{EN DASH}"
"""The text of a cell without a finite number."""

ALL_TASKS = "average"


class Losses(NamedTuple):
    """The change of a merge's scores where one expert is left out.

    Attributes:
        experts: The experts that were left out.
        tasks: Names of the tasks, and the average last.
        changes: Points (of shares, in percent) or nats, `[experts, tasks]`.
        metric: The metric of the scores.
    """

    experts: list[str]
    tasks: list[str]
    changes: Float[np.ndarray, "experts tasks"]
    metric: Metric

    @classmethod
    def of(cls, merge: Row, without: Sequence[Row]) -> "Losses":
        """Subtracts the merge's scores from those without each expert."""
        factor = 100 if merge.metric in SHARES else 1
        changes = [
            [factor * (row.tasks[task] - score) for task, score in merge.tasks.items()]
            for row in without
        ]
        of_tasks = np.array(changes)
        means = of_tasks.mean(1, keepdims=True)
        experts = [row.method for row in without]
        tasks = [*merge.tasks, ALL_TASKS]
        return cls(experts, tasks, np.concatenate([of_tasks, means], 1), merge.metric)

    @property
    def title(self) -> str:
        """The title of the table."""
        unit = "points" if self.metric in SHARES else "nats per token"
        return f"Change of each task without an expert ({unit})"

    def text(self, value: float) -> str:
        """Returns a change with its sign."""
        if not np.isfinite(value):
            return _NOTHING
        return f"{value:+.1f}" if self.metric in SHARES else f"{value:+.3f}"

    def style(self, value: float) -> str:
        """Returns the CSS of a change: orange is worse, violet better, white none."""
        largest = np.abs(self.changes[np.isfinite(self.changes)]).max(initial=0) or 1.0
        better = value if self.metric in SHARES else -value
        return cell_style(better, -largest, largest, DIVERGING) if np.isfinite(value) else ""


def losses_grid(losses: Losses) -> Grid:
    """Returns the heat map: a line for each expert that was left out, a column for each task."""
    lines = [
        Line(f"without {expert}", [Cell(losses.text(v), losses.style(v)) for v in changes])
        for expert, changes in zip(losses.experts, losses.changes.tolist(), strict=True)
    ]
    return Grid(losses.title, losses.tasks, lines)


def losses_in_words(losses: Losses) -> str:
    """Returns a sentence on the expert by whose absence a task loses most, beside its own."""
    better = losses.changes[:, :-1] * (1 if losses.metric in SHARES else -1)
    foreign = np.array(
        [[task != expert for task in losses.tasks[:-1]] for expert in losses.experts]
    )
    candidates = np.where(foreign & np.isfinite(better), better, np.inf)
    if not np.isfinite(candidates).any() or candidates.min() >= 0:
        return "No task loses by the absence of another task's expert."
    row, column = np.unravel_index(candidates.argmin(), candidates.shape)
    change = losses.text(losses.changes[row, column])
    return (
        f"The task that counts most on another task's expert is {losses.tasks[column]}: {change} "
        f"without {losses.experts[row]}."
    )


def losses_table(losses: Losses) -> Table:
    """Returns the changes as a table for the console."""
    table = Table(title=losses.title)
    table.add_column("without", overflow="fold")
    for task in losses.tasks:
        table.add_column(Text(one_line(task)), justify="right", no_wrap=True)
    for expert, changes in zip(losses.experts, losses.changes.tolist(), strict=True):
        table.add_row(Text(one_line(expert)), *map(losses.text, changes))
    return table
