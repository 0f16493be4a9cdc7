"""The chart of scores: a panel for each task, and in it a line for each method."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from adamerge_jax.report.results import in_words
from adamerge_jax.runs.results import Results
from adamerge_jax.runs.rows import SHARES, Row

COUNTED = ("accuracy", "exact_match", "recall_at_1", "recall_at_10")
"""The metrics that count examples, whose interval follows from their number."""

_NORMAL = 1.959964
"""The standard deviations within which a normal variable is in 95 of 100 cases."""

_LARGEST = 1e9
"""The largest score that is drawn; a merge that has diverged would make a line of all others."""

_ROOM = 0.04
"""The part of the axis that is left free on both sides."""


class Bar(NamedTuple):
    """A method in a panel; places are in percent of the axis.

    Attributes:
        name: The method.
        text: Its score as tables show it.
        kind: The part that it plays; see `Row.kind`.
        place: The place of its score; None where it is too large to be drawn, or no number.
        low: The place of the lower end of its interval; None where it is not known.
        high: The place of the upper end.
        words: Score and interval in words.
    """

    name: str
    text: str
    kind: str
    place: float | None
    low: float | None
    high: float | None
    words: str


class Tick(NamedTuple):
    """A value on the axis: its place in percent, and its text."""

    place: float
    text: str


class Panel(NamedTuple):
    """The scores of all methods on one task, or on average.

    Attributes:
        title: The task.
        bars: The methods in their order.
        experts: The place of the experts' score; None without one.
        ticks: Values on the axis.
        examples: The number of test examples; None where it is not known.
    """

    title: str
    bars: list[Bar]
    experts: float | None
    ticks: list[Tick]
    examples: int | None


def score_panels(results: Results) -> list[Panel]:
    """Returns the panels of a table of results, the average first.

    The interval of a share of N examples is Wilson's, and on average that
    of a sum of independent shares. Of other metrics only the merge has one, from its outcome.

    Args:
        results: A table with at least one row, and its outcome.
    """
    rows, outcome = results.rows, results.outcome
    tasks = list(rows[0].tasks)
    columns = [None, *tasks] if len(tasks) > 1 else [*tasks]
    sizes = (outcome.examples if outcome else None) or {}
    panels = []
    for task in columns:
        scores = [_score(row, task) for row in rows]
        intervals = [_interval(results, position, task) for position in range(len(rows))]
        axis = _Axis.around([*scores, *(end for ends in intervals if ends for end in ends)])
        bars = [
            _bar(row, score, interval, axis)
            for row, score, interval in zip(rows, scores, intervals, strict=True)
        ]
        experts = next((bar.place for bar in bars if bar.kind == "experts"), None)
        ticks = [Tick(axis.place(v) or 0.0, _tick_text(v, rows[0].metric)) for v in axis.values]
        title = "average" if task is None else task
        panels.append(Panel(title, bars, experts, ticks, sizes.get(task) if task else None))
    return panels


def _bar(row: Row, score: float, interval: tuple[float, float] | None, axis: "_Axis") -> Bar:
    """Returns a method's line in a panel."""
    text = in_words(score, row.metric)
    words = f"{row.method}: {text}"
    if interval is None:
        return Bar(row.method, text, row.kind, axis.place(score), None, None, words)
    low, high = interval
    words += f", 95% interval {in_words(low, row.metric)} to {in_words(high, row.metric)}"
    place, low_place, high_place = (axis.place(value) for value in (score, low, high))
    return Bar(row.method, text, row.kind, place, low_place, high_place, words)


def _score(row: Row, task: str | None) -> float:
    return row.average if task is None else row.tasks[task]


def _interval(results: Results, position: int, task: str | None) -> tuple[float, float] | None:
    """Returns the ends of a score's 95% interval; None where it is not known."""
    rows, outcome = results.rows, results.outcome
    row = rows[position]
    if row.metric in COUNTED:
        sizes = outcome.examples if outcome else None
        if not sizes or any(not sizes.get(name) for name in row.tasks):
            return None
        if task is not None:
            return wilson_interval(row.tasks[task], sizes[task])
        variances = [share * (1 - share) / sizes[name] for name, share in row.tasks.items()]
        reach = _NORMAL * math.sqrt(max(0.0, sum(variances))) / len(variances)
        return row.average - reach, row.average + reach
    if outcome is None or position != len(rows) - 1:
        return None
    standing = outcome.average if task is None else outcome.tasks[task]
    return standing.score.interval


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Returns the ends of the 95% interval of a share.

    Args:
        share: The share that was found, from 0 to 1.
        count: The number of examples that it is a share of.

    Source: Wilson, Journal of the American Statistical Association, 1927.

    Examples:
        >>> low, high = wilson_interval(0.9, 100)
        >>> round(low, 3), round(high, 3)
        (0.826, 0.945)
    """
    square = _NORMAL**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    variance = share * (1 - share) / count + square / (4 * count**2)
    reach = _NORMAL * math.sqrt(max(0.0, variance)) / (1 + square / count)
    return middle - reach, middle + reach


class _Axis(NamedTuple):
    """The axis of a panel: its two ends, and round values on it."""

    low: float
    high: float
    values: Sequence[float]

    @classmethod
    def around(cls, numbers: Sequence[float]) -> "_Axis":
        """Makes an axis with room for all numbers that can be drawn."""
        shown = [number for number in numbers if abs(number) <= _LARGEST] or [0.0]
        low, high = min(shown), max(shown)
        width = (high - low) or abs(high) or 1.0
        low, high = low - _ROOM * width, high + _ROOM * width
        step = 10.0 ** math.floor(math.log10(width / 2))
        step = next(step * factor for factor in (1, 2, 5, 10) if width / (step * factor) <= 4)
        first, last = math.ceil(low / step), math.floor(high / step)
        return cls(low, high, [float(step * number) for number in range(first, last + 1)])

    def place(self, value: float) -> float | None:
        """Returns the place of a value in percent of the axis; None where it is not drawn."""
        if not abs(value) <= _LARGEST:
            return None
        return round(100 * (value - self.low) / (self.high - self.low), 2)


def _tick_text(value: float, metric: str) -> str:
    return f"{100 * value:g}" if metric in SHARES else f"{value:.3g}"
