"""The scores by lm-evaluation-harness, for people: a line for each task and metric."""

from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from adamerge_jax.report.grids import Cell, Grid, Line
from adamerge_jax.report.plain_text import one_line
from adamerge_jax.runs.harness import HarnessLine, HarnessResults, HarnessScore

_NOTHING = "\N{EN DASH}"
"""The text of a cell without a finite number."""

_ARROWS = {True: " \N{UPWARDS ARROW}", False: " \N{DOWNWARDS ARROW}", None: ""}
"""Behind a metric, by whether more is better."""


class TableLine(NamedTuple):
    """A line of the table.

    Attributes:
        task: The task, with the number of solved examples in its prompts.
        metric: The metric, with an arrow to where it is better.
        cells: The score of each model, and the merge's standard error.
        best: Whether each model's score is the best one of the line.
    """

    task: str
    metric: str
    cells: list[str]
    best: list[bool]


class HarnessTable(NamedTuple):
    """The table of scores as people read it.

    Attributes:
        title: Its title.
        models: The names of its columns, the merge last.
        lines: Its lines.
    """

    title: str
    models: list[str]
    lines: list[TableLine]

    @classmethod
    def of(cls, results: HarnessResults) -> "HarnessTable":
        """Makes the table of all tasks that are shown."""
        notes = []
        if results.limit is not None:
            notes.append(f"the first {results.limit:,} examples of each task")
        if results.chat_template:
            notes.append("prompts in the chat template of the merge")
        title = f"Scores by lm-eval {results.version}" + (f" ({', '.join(notes)})" if notes else "")
        lines = [_table_line(line) for line in results.lines()]
        return cls(title, [row.model for row in results.rows], lines)

    @property
    def in_words(self) -> str:
        """A sentence on its signs."""
        return (
            "An arrow points to where a metric is better; \N{PLUS-MINUS SIGN} is a standard error."
        )

    def grid(self) -> Grid:
        """Returns the table of a page."""
        lines = [
            Line(
                f"{line.task}, {line.metric}",
                [Cell(text, best=best) for text, best in zip(line.cells, line.best, strict=True)],
            )
            for line in self.lines
        ]
        return Grid(self.title, self.models, lines)


def harness_table(results: HarnessResults) -> Table:
    """Returns the scores as a table for the console; the merge stands out."""
    shown = HarnessTable.of(results)
    table = Table(title=Text(one_line(shown.title)), title_style="bold")
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    for model in shown.models:
        # A checkpoint may be called by a long path; numbers are never broken.
        style = "bold green" if model is shown.models[-1] else None
        table.add_column(Text(one_line(model)), justify="right", overflow="fold", style=style)
    for line in shown.lines:
        cells = [Text(cell, no_wrap=True) for cell in line.cells]
        table.add_row(Text(one_line(line.task)), Text(one_line(line.metric)), *cells)
    table.caption = Text(shown.in_words)
    table.caption_justify = "left"
    return table


def _table_line(line: HarnessLine) -> TableLine:
    values = [score.value for score in line.scores if score.value is not None]
    best = None
    if len(values) > 1 and line.higher_is_better is not None:
        best = max(values) if line.higher_is_better else min(values)
    return TableLine(
        f"{line.task}, {line.shots}-shot" if line.shots else line.task,
        f"{line.metric}{_ARROWS[line.higher_is_better]}",
        [*map(_in_words, line.scores[:-1]), _in_words(line.scores[-1], with_error=True)],
        [best is not None and score.value == best for score in line.scores],
    )


def _in_words(score: HarnessScore, *, with_error: bool = False) -> str:
    """Returns a score with as many digits as the harness prints."""
    if score.value is None:
        return _NOTHING
    number = f"{score.value:.4f}"
    if not with_error or score.stderr is None:
        return number
    return f"{number} \N{PLUS-MINUS SIGN} {score.stderr:.4f}"
