"""The outcome of a merge: how near it comes to its experts, and how sure that is."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from adamerge_jax.runs.rows import (
    SHARES,
    ExampleScores,
    Row,
    best_with_heads,
    best_without_learning,
)

CONFIDENCE = 0.95
"""The part of other test data of the same size for which a number would lie in its interval."""

FEWEST_EXAMPLES = 10
"""Test examples of a task under which an interval would say more than so few can tell."""

RESAMPLES = 2000
"""The number of test sets that are drawn from the given one."""

_ROUNDING = 1e-9
"""The size of differences that are nothing but rounding."""

_COUNTS_IN_MEMORY = 2_000_000
"""The largest number of counts that are drawn at once."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number that was measured on test data.

    Attributes:
        value: The number on these test data.
        interval: The ends of its 95% interval over other test data of the same size; None where it
            is not known.
    """

    value: float
    interval: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Standing:
    """The merge among its baselines and the experts, on one task or on average.

    Attributes:
        score: Score of the merge.
        share: Its score divided by that of the experts; None where there is none to divide by.
        gap: The experts' lead over the best row without learning, over 0 where they are better;
            None where one of the two is missing.
        closed: The part of this gap that the merge closes: 0 is as good as the best row without
            learning, 1 as good as the experts. None where there is no gap to close.
    """

    score: Estimate
    share: Estimate | None = None
    gap: Estimate | None = None
    closed: Estimate | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a merge.

    Attributes:
        tasks: The standing of the merge by task.
        average: Its standing on average over the tasks.
        reference: Name of the best row on average that nothing was learned for; None without one.
        examples: Number of test examples by task; None where it is not known.
        with_heads: Name of the best row on average whose heads alone were fitted; None without one.
        with_heads_score: Its average.
    """

    tasks: dict[str, Standing]
    average: Standing
    reference: str | None = None
    examples: dict[str, int] | None = None
    with_heads: str | None = None
    with_heads_score: float | None = None


def measure_outcome(rows: Sequence[Row]) -> Outcome | None:
    """Measures how near the merge comes to the experts, from the best row without learning.

    Intervals are those of a paired bootstrap: test sets are drawn from the given examples, with
    replacement and for each task by itself, and all rows are scored on the same draws (Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). A gap whose interval reaches 0
    is no gap, nor is one of a task with under `FEWEST_EXAMPLES` examples.

    Args:
        rows: The table, the merge last.

    Returns:
        The outcome; without intervals where a row has no scores of examples. None where there is no
        row, or where a score of the merge is not finite.
    """
    if not rows or not np.isfinite(list(rows[-1].tasks.values())).all():
        return None
    merged = rows[-1]
    experts = next((row for row in rows if row.kind == "experts"), None)
    reference, with_heads = best_without_learning(rows[:-1]), best_with_heads(rows[:-1])
    compared = [merged, experts, reference]
    present = [position for position, row in enumerate(compared) if row is not None]
    has_examples = all(compared[position].examples is not None for position in present)
    # [rows, tasks + average], NaN for a row that is missing or where nothing is drawn.
    tasks = list(merged.tasks)
    values = np.full((len(compared), len(tasks) + 1), np.nan)
    drawn = np.full((RESAMPLES, *values.shape), np.nan)
    for position in present:
        row = compared[position]
        values[position] = [*(row.tasks[task] for task in tasks), row.average]
    sizes = None
    if has_examples:
        sizes = {task: len(merged.examples[task].values) for task in tasks}
        for column, task in enumerate(tasks):
            if sizes[task] >= FEWEST_EXAMPLES:
                scores = [compared[position].examples[task] for position in present]
                drawn[:, present, column] = _redraw(scores, np.random.default_rng([0, column]))
        drawn[..., -1] = drawn[..., :-1].mean(-1)
    sign = 1 if merged.metric in SHARES else -1
    standings = [
        _standing(values[:, column], drawn[..., column], sign, needs_interval=has_examples)
        for column in range(len(tasks) + 1)
    ]
    return Outcome(
        dict(zip(tasks, standings[:-1], strict=True)),
        standings[-1],
        None if reference is None else reference.method,
        sizes,
        None if with_heads is None else with_heads.method,
        None if with_heads is None else with_heads.average,
    )


def _standing(
    values: Float[np.ndarray, "3"],
    drawn: Float[np.ndarray, "resamples 3"],
    sign: int,
    *,
    needs_interval: bool,
) -> Standing:
    """Returns the standing in one column.

    Args:
        values: The scores of the merge, the experts and the reference; NaN for a missing one.
        drawn: Their scores on each drawn test set; NaN where nothing was drawn.
        sign: 1 where more is better, -1 where less is.
        needs_interval: True if a gap counts only where its interval is over 0.
    """
    merged, experts, reference = values
    drawn_merged, drawn_experts, drawn_reference = drawn.T
    drawn_gap = sign * (drawn_experts - drawn_reference)
    gap = _estimate(sign * (experts - reference), drawn_gap)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = _estimate(merged / experts, drawn_merged / drawn_experts)
    closed = None
    if gap is not None and gap.value > _ROUNDING:
        lowest = gap.interval[0] if gap.interval else (-math.inf if needs_interval else gap.value)
        if lowest > _ROUNDING:
            # The few draws without a gap have no part of it that could be closed.
            with_gap = (drawn_gap > _ROUNDING) | np.isnan(drawn_gap)
            gained = (sign * (drawn_merged - drawn_reference))[with_gap]
            closed = _estimate(
                sign * (merged - reference) / gap.value, gained / drawn_gap[with_gap]
            )
    return Standing(Estimate(float(merged), _interval(drawn_merged)), share, gap, closed)


def _estimate(value: float, drawn: Float[np.ndarray, " resamples"]) -> Estimate | None:
    return Estimate(float(value), _interval(drawn)) if math.isfinite(value) else None


def _interval(drawn: Float[np.ndarray, " resamples"]) -> tuple[float, float] | None:
    """Returns the ends of the percentile interval, or None where a draw has no value."""
    if not np.isfinite(drawn).all():
        return None
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return round(float(low), 6), round(float(high), 6)


def _redraw(
    scores: Sequence[ExampleScores], generator: np.random.Generator
) -> Float[np.ndarray, "resamples rows"]:
    """Returns the means of several models on test sets that are drawn from one task's examples.

    Examples on which all models have the same scores are drawn together, by their number: of
    accuracies there are at most 8 kinds, however many examples.
    """
    counts, values = ([getattr(model, part) for model in scores] for part in ("counts", "values"))
    columns = np.stack([*counts, *values]).astype(np.float64)
    kinds, sizes = np.unique(columns, axis=1, return_counts=True)
    count = columns.shape[1]
    at_once = max(1, _COUNTS_IN_MEMORY // kinds.shape[1])
    sums = np.concatenate(
        [
            generator.multinomial(count, sizes / count, min(at_once, RESAMPLES - start)) @ kinds.T
            for start in range(0, RESAMPLES, at_once)
        ]
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[:, len(scores) :] / sums[:, : len(scores)]
