"""The outcome of a merge, against the same numbers by other ways."""

import numpy as np
import pytest

from adamerge_jax.runs.outcome import FEWEST_EXAMPLES, Outcome, measure_outcome
from adamerge_jax.runs.rows import ExampleScores, Row

TASKS = {"a": 120, "b": 400}
"""The number of test examples of each task."""


def accuracy_rows(**rights: float) -> list[Row]:
    """Rows by kind that are right on this part of examples, drawn at random."""
    generator = np.random.default_rng(0)
    drawn = {task: generator.random(size) for task, size in TASKS.items()}
    return [
        Row.of_examples(
            kind,
            {
                # What is hard for one is hard for all, mostly.
                task: ExampleScores(
                    (drawn[task] + 0.2 * generator.random(size) < part + 0.1).astype(np.float32),
                    np.ones(size, np.int32),
                )
                for task, size in TASKS.items()
            },
            "accuracy",
            kind,
        )
        for kind, part in rights.items()
    ]


def loss_rows(**factors: float) -> list[Row]:
    generator = np.random.default_rng(1)
    counts = {task: generator.integers(1, 40, size) for task, size in TASKS.items()}
    hard = {task: generator.gamma(2.0, size=size) for task, size in TASKS.items()}
    return [
        Row.of_examples(
            kind,
            {
                task: ExampleScores(
                    (factor * hard[task] * counts[task]).astype(np.float32)
                    + generator.random(size).astype(np.float32),
                    counts[task],
                )
                for task, size in TASKS.items()
            },
            "loss",
            kind,
        )
        for kind, factor in factors.items()
    ]


ROWS = {
    "accuracy": accuracy_rows(baseline=0.5, experts=0.9, learned=0.8),
    "loss": loss_rows(baseline=2.0, experts=1.0, learned=1.3),
}


@pytest.mark.parametrize("metric", ROWS)
def test_intervals_are_those_of_a_plain_paired_bootstrap(metric):
    """A loop over drawn examples, with draws of its own: the ends agree up to chance."""
    base, experts, merged = ROWS[metric]
    generator = np.random.default_rng(5)
    drawn = []
    for _ in range(4000):
        means = np.zeros(3)
        for task, size in TASKS.items():
            chosen = generator.integers(size, size=size)
            for position, row in enumerate((base, experts, merged)):
                values, counts, _ = row.examples[task]
                means[position] += values[chosen].sum() / counts[chosen].sum() / len(TASKS)
        drawn.append(means)
    low, high, best = np.array(drawn).T
    average = measure_outcome([base, experts, merged]).average
    sign = 1 if metric == "accuracy" else -1
    for estimate, expected, replicates in (
        (average.score, merged.average, best),
        (average.share, merged.average / experts.average, best / high),
        (average.gap, sign * (experts.average - base.average), sign * (high - low)),
        (
            average.closed,
            (merged.average - base.average) / (experts.average - base.average),
            (best - low) / (high - low),
        ),
    ):
        assert estimate.value == pytest.approx(expected)
        ends = np.quantile(replicates, [0.025, 0.975])
        assert estimate.interval == pytest.approx(ends, abs=0.1 * (ends[1] - ends[0]))
        assert estimate.interval[0] < estimate.value < estimate.interval[1]


@pytest.mark.parametrize("metric", ROWS)
def test_pairing_makes_intervals_small(metric):
    """Unpaired, the two interval widths of a difference would add up."""
    base, experts, merged = ROWS[metric]
    outcome = measure_outcome([base, experts, merged])
    closed = outcome.average.closed
    alone = outcome.average.score.interval
    gap = abs(experts.average - base.average)
    assert closed.interval[1] - closed.interval[0] < (alone[1] - alone[0]) / gap


def test_the_same_rows_give_the_same_intervals():
    assert measure_outcome(ROWS["loss"]) == measure_outcome(ROWS["loss"])


def test_a_gap_is_measured_from_the_best_row_without_learning():
    rows = [
        Row("base", {"a": 0.2}),
        Row("experts (one model each)", {"a": 0.8}, kind="experts"),
        Row("average", {"a": 0.6}),
        Row("task arithmetic (0.3)", {"a": 0.4}),
        Row("learned (row)", {"a": 0.7}, kind="learned"),
    ]
    outcome = measure_outcome(rows)
    assert outcome.reference == "average"
    assert outcome.average.closed.value == pytest.approx(0.5)  # 75% from task arithmetic
    assert outcome.tasks["a"].closed.interval is None
    assert outcome.examples is None
    losses = [row._replace(metric="loss") for row in rows]
    assert measure_outcome(losses).reference == "base"
    assert measure_outcome(losses).average.closed is None


def test_a_method_may_be_called_as_the_experts_are():
    rows = [
        Row("experts_lib:merge", {"a": 0.6}),
        Row("experts (one model each)", {"a": 0.8}, kind="experts"),
        Row("learned (row)", {"a": 0.7}, kind="learned"),
    ]
    assert measure_outcome(rows).reference == "experts_lib:merge"
    assert measure_outcome(rows).average.share.value == pytest.approx(0.875)


def tiny(kind: str, size: int, part: float) -> Row:
    scores = ExampleScores(np.full(size, part, np.float32), np.ones(size, np.int32))
    return Row.of_examples(kind, {"tiny": scores}, "accuracy", kind)


def joined(kind: str, row: Row, other: Row) -> Row:
    return Row.of_examples(kind, {**row.examples, **other.examples}, "accuracy", kind)


def test_one_task_with_few_examples_leaves_the_others_their_intervals():
    parts = {"baseline": 0.0, "experts": 1.0, "learned": 1.0}
    rows = [
        joined(row.kind, row, tiny(row.kind, FEWEST_EXAMPLES - 1, parts[row.kind]))
        for row in ROWS["accuracy"]
    ]
    outcome = measure_outcome(rows)
    assert outcome.tasks["a"] == measure_outcome(ROWS["accuracy"]).tasks["a"]
    assert outcome.tasks["tiny"].score.interval is None
    assert outcome.tasks["tiny"].closed is outcome.average.closed is None
    assert outcome.average.score.interval is None
    assert outcome.average.share.value < 1


def test_rows_that_cannot_be_compared():
    base, experts, merged = ROWS["accuracy"]
    assert measure_outcome([]) is None
    alone = measure_outcome([merged])
    assert alone == Outcome(alone.tasks, alone.average, None, TASKS)
    assert alone.average.score.interval is not None
    assert alone.average.share is alone.average.gap is alone.average.closed is None
    without = measure_outcome([experts, merged])
    assert without.average.share.interval is not None
    assert without.average.gap is None
    # Experts that are always wrong have no share, and lead nobody.
    wrong = experts._replace(tasks=dict.fromkeys(TASKS, 0.0), examples=None)
    outcome = measure_outcome([base, wrong, merged])
    assert outcome.average.share is outcome.average.closed is None
    assert outcome.average.gap.value < 0
    diverged = base._replace(method="other", tasks={"a": float("nan"), "b": 1.0})
    assert measure_outcome([base, diverged, experts, merged]).reference == "baseline"
    assert measure_outcome([diverged, experts, merged]).reference is None
