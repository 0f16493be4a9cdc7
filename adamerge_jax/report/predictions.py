"""The classes that a merge gives test examples, and some on which it differs from experts."""

from collections.abc import Sequence
from typing import NamedTuple

from adamerge_jax.report.colours import SEQUENTIAL_LIGHT, cell_style
from adamerge_jax.report.grids import Cell, Grid, Line
from adamerge_jax.runs.predictions import Predictions, TaskPredictions

MOST_IN_A_TABLE = 12
"""The number of classes beyond which the commonest mistakes are listed in place of a table."""

_MOST_MISTAKES = 10
"""The number of mistakes in such a list."""

_SHORT = 3
"""The characters of a class's name beyond which a phone has no room for it above a column."""

_NO_CLASS = "no class"


class Shown(NamedTuple):
    """An example on which merge and expert differ.

    Attributes:
        text: Its text; None where it is none.
        image: A data URI of its image; None where it is none.
        label: Its class.
        expert: The class that the expert gives it.
        merge: The class that the merge gives it.
        index: Its position among the test examples.
    """

    text: str | None
    image: str | None
    label: str
    expert: str
    merge: str
    index: int


class PredictionView(NamedTuple):
    """The predictions of the merge on one task.

    Attributes:
        task: The task.
        grid: The table of classes, or the commonest mistakes.
        kind: The CSS classes of the table.
        differing: The numbers of examples on which merge and expert differ, in words; None where
            what the expert says is not known.
        shown: Some of these examples.
    """

    task: str
    grid: Grid
    kind: str
    differing: str | None
    shown: list[Shown]


def prediction_views(predictions: Predictions) -> list[PredictionView]:
    """Returns what a page shows of the predictions, by task."""
    views = []
    for task, of_task in predictions.items():
        if len(of_task.class_names) <= MOST_IN_A_TABLE:
            grid, kind = _table(task, of_task), "heat confusion"
            if max(map(len, grid.columns), default=0) > _SHORT:
                kind += " upright"
        else:
            grid, kind = _mistakes(task, of_task), ""
        views.append(PredictionView(task, grid, kind, _differing(of_task), _examples(of_task)))
    return views


def _table(task: str, predictions: TaskPredictions) -> Grid:
    """Returns the number of examples by class and by what the merge takes them for."""
    names = predictions.class_names
    counts = {(count.label, count.merge): count.count for count in predictions.counts}
    columns = [*range(len(names)), *([-1] if any(given == -1 for _, given in counts) else [])]
    lines = []
    for label, name in enumerate(names):
        row = [counts.get((label, given), 0) for given in columns]
        total = sum(row)
        if total:
            cells = [
                Cell(str(count or ""), cell_style(count / total, 0, 1, SEQUENTIAL_LIGHT))
                for count in row
            ]
            lines.append(Line(name, cells))
    headings = [names[given] if given >= 0 else _NO_CLASS for given in columns]
    return Grid(f"{task}: the label down, what the merge says across", headings, lines)


def _mistakes(task: str, predictions: TaskPredictions) -> Grid:
    """Returns the commonest mistakes, a line each."""
    names = predictions.class_names
    wrong = [count for count in predictions.counts if count.label != count.merge]
    wrong.sort(key=lambda count: -count.count)
    lines = [
        Line(_name(names, one.label), [Cell(_name(names, one.merge)), Cell(str(one.count))])
        for one in wrong[:_MOST_MISTAKES]
    ]
    return Grid(f"{task}: the commonest mistakes", ["the merge says", "examples"], lines)


def _differing(predictions: TaskPredictions) -> str | None:
    if predictions.differing is None:
        return None
    total = sum(count.count for count in predictions.counts)
    return (
        f"Merge and expert differ on {predictions.differing:,} of {total:,} test examples: on "
        f"{predictions.expert_alone_right:,} the expert alone is right, on "
        f"{predictions.merge_alone_right:,} the merge alone."
    )


def _examples(predictions: TaskPredictions) -> list[Shown]:
    names = predictions.class_names
    return [
        Shown(
            one.text,
            None if one.image is None else f"data:image/png;base64,{one.image}",
            _name(names, one.label),
            _name(names, one.expert),
            _name(names, one.merge),
            one.index,
        )
        for one in predictions.differences
    ]


def _name(names: Sequence[str], position: int) -> str:
    return names[position] if position >= 0 else _NO_CLASS
