"""The table of a comparison: means over seeds, and each method's place beside the experts."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from adamerge_jax.comparison.measure import Measured
from adamerge_jax.evaluation.retention import GENERAL_TEXT
from adamerge_jax.runs.outcome import Estimate, Standing, measure_outcome
from adamerge_jax.runs.rows import (
    ExampleScores,
    Kind,
    Metric,
    Row,
    best_with_heads,
    best_without_learning,
)


class Spread(NamedTuple):
    """A number over seeds.

    Attributes:
        mean: The mean.
        deviation: The standard deviation of a sample; None with one seed.
    """

    mean: float
    deviation: float | None = None

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Spread":
        """Returns the mean and the standard deviation of numbers."""
        deviation = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
        return cls(float(np.mean(numbers)), deviation)

    def as_json(self) -> dict[str, float | None]:
        """Returns the numbers as JSON has them; one that is not finite is null."""
        return {
            name: number if number is not None and math.isfinite(number) else None
            for name, number in self._asdict().items()
        }


@dataclasses.dataclass(frozen=True)
class MethodSummary:
    """One line of the table.

    Attributes:
        name: The name of the method.
        kind: The part that the row plays.
        seeds: The seeds that were measured; empty for the base and the experts.
        tasks: The score of each task.
        average: The average over tasks.
        standing: The place of the mean over seeds between the best merge without learning and the
            experts; None where a score is not finite.
        beyond_heads: For what is learned: the part that it closes of the gap from the best merge
            without learning whose heads were fitted; None without one.
        seconds: The time of the merge, without its evaluation.
        peak_memory_bytes: The largest memory of all seeds.
        steps: The number of optimizer steps.
        coefficients: The number of learned coefficients.
        chosen: The options that validation data chose.
    """

    name: str
    kind: Kind
    seeds: tuple[int, ...]
    tasks: dict[str, Spread]
    average: Spread
    standing: Standing | None = None
    beyond_heads: Estimate | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    steps: int = 0
    coefficients: int = 0
    chosen: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The results of a comparison.

    Attributes:
        metric: The meaning of the scores.
        methods: The base and the experts, then the methods from the best to the worst.
        reference: The name of the best merge without learning.
        reference_with_heads: The name of the best of them whose heads were fitted.
        examples: The number of test examples by task; empty where they differ from seed to seed.
        devices: The kinds of devices that it was measured on.
        failed: The reason by method that has no row.
        further: The same methods by other metrics, on all tasks or on some.
    """

    metric: Metric
    methods: tuple[MethodSummary, ...]
    reference: str | None
    reference_with_heads: str | None
    examples: dict[str, int]
    devices: tuple[str, ...]
    failed: dict[str, str]
    further: tuple["Comparison", ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Returns the fields as JSON has them; a number that is not finite is null."""
        fields = dataclasses.asdict(dataclasses.replace(self, further=()))
        for method, summary in zip(fields["methods"], self.methods, strict=True):
            method["average"] = summary.average.as_json()
            method["tasks"] = {task: spread.as_json() for task, spread in summary.tasks.items()}
        return fields | {"further": [table.as_json() for table in self.further]}


def summarise(
    references: Measured,
    measured: Mapping[str, Mapping[int, Measured]],
    failed: Mapping[str, str],
) -> Comparison:
    """Returns the table of what was measured.

    Intervals and shares are those of the mean over seeds on test sets that are drawn anew, paired
    over all rows (see `measure_outcome`).

    Args:
        references: The base and the experts.
        measured: The results by method and seed.
        failed: The reason by method that has no row.
    """
    means = {name: _mean_row([m.rows[0] for m in s.values()]) for name, s in measured.items()}
    rows = [*references.rows, *(row for row in means.values() if row.kind != "learned")]
    reference, with_heads = best_without_learning(rows), best_with_heads(rows)
    summaries = [
        _summary(name, by_seed, means[name], rows, with_heads) for name, by_seed in measured.items()
    ]
    summaries.sort(key=lambda summary: means[summary.name].score, reverse=True)
    ends = [_summary_of_reference(row, references) for row in references.rows]
    devices = {m.cost.device for s in measured.values() for m in s.values()}
    first = references.rows[0]
    further = [_by_metric_summarised(references, measured, other.metric) for other in first.further]
    return Comparison(
        first.metric,
        (*ends, *summaries),
        None if reference is None else reference.method,
        None if with_heads is None else with_heads.method,
        {task: len(scores.values) for task, scores in (first.examples or {}).items()},
        tuple(sorted(devices | {references.cost.device})),
        dict(failed),
        tuple(further),
    )


def _by_metric_summarised(
    references: Measured, measured: Mapping[str, Mapping[int, Measured]], metric: Metric
) -> Comparison:
    """Returns the table by another metric, of the rows that have it."""
    by_metric: dict[str, dict[int, Measured]] = {}
    for name, by_seed in measured.items():
        for seed, results in by_seed.items():
            if (chosen := _by_metric(results, metric)) is not None:
                by_metric.setdefault(name, {})[seed] = chosen
    chosen_references = _by_metric(references, metric)
    assert chosen_references is not None  # it is one of theirs
    return summarise(chosen_references, by_metric, {})


def _by_metric(measured: Measured, metric: Metric) -> Measured | None:
    """Returns the results of a contender by another metric; None where it has none.

    General text for tests is drawn with each seed, apart from what is learned from: what is paired
    with the same examples elsewhere is not there.
    """
    rows = [
        other._replace(examples=None) if GENERAL_TEXT in other.tasks else other
        for row in measured.rows
        for other in row.further
        if other.metric == metric
    ]
    return measured._replace(rows=rows) if rows else None


def _mean_row(rows: Sequence[Row]) -> Row:
    """Returns the row of the means over seeds, of each task and of each example."""
    first = rows[0]
    tasks = {task: float(np.mean([row.tasks[task] for row in rows])) for task in first.tasks}
    if first.examples is None:
        return first._replace(tasks=tasks)
    examples = {
        task: ExampleScores(
            np.mean([row.examples[task].values for row in rows], axis=0, dtype=np.float64),
            first.examples[task].counts,
        )
        for task in first.tasks
    }
    return first._replace(tasks=tasks, examples=examples)


def _standing(rows: Sequence[Row]) -> Standing | None:
    """Returns the place of the last row on average over the tasks."""
    outcome = measure_outcome(rows)
    return None if outcome is None else outcome.average


def _summary(
    name: str,
    by_seed: Mapping[int, Measured],
    mean: Row,
    others: Sequence[Row],
    with_heads: Row | None,
) -> MethodSummary:
    """Returns the line of one method.

    Args:
        name: Its name.
        by_seed: Its results by seed.
        mean: The row of its means over seeds.
        others: The base, the experts and all merges without learning.
        with_heads: The best of the latter whose heads were fitted.
    """
    rows = [measured.rows[0] for measured in by_seed.values()]
    costs = [measured.cost for measured in by_seed.values()]
    standing, beyond = _standing([*others, mean]), None
    if standing is not None and mean.kind == "baseline":
        # What nothing was fitted for is where the gap begins.
        standing = dataclasses.replace(standing, gap=None, closed=None)
    if with_heads is not None and mean.kind == "learned":
        experts = [row for row in others if row.kind == "experts"]
        place = _standing([*experts, with_heads._replace(kind="baseline"), mean])
        beyond = None if place is None else place.closed
    return MethodSummary(
        name,
        rows[0].kind,
        tuple(by_seed),
        {task: Spread.of([row.tasks[task] for row in rows]) for task in rows[0].tasks},
        Spread.of([row.average for row in rows]),
        standing,
        beyond,
        float(np.mean([cost.seconds for cost in costs])),
        max(cost.peak_memory_bytes for cost in costs),
        costs[0].steps,
        costs[0].coefficients,
        next(iter(by_seed.values())).chosen,
    )


def _summary_of_reference(row: Row, references: Measured) -> MethodSummary:
    tasks = {task: Spread(score) for task, score in row.tasks.items()}
    experts = [other for other in references.rows if other.kind == "experts"]
    outcome = measure_outcome([*experts, row])
    standing = None if outcome is None else outcome.average
    return MethodSummary(row.method, row.kind, (), tasks, Spread(row.average), standing)
