"""The rows of the table of results: a model's score on each task, and on each example of it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Int
from pydantic import ConfigDict, TypeAdapter

Metric = Literal[
    "accuracy",
    "loss",
    "exact_match",
    "token_accuracy",
    "answer_loss",
    "base_answers",
    "base_agreement",
    "base_divergence",
    "spearman",
    "recall_at_1",
    "recall_at_10",
    "word_accuracy",
    "entity_f1",
    "micro_f1",
    "macro_f1",
    "pearson",
    "r2",
    "of_each_task",
]
"""The meaning of a score: the share of right classes; nats per token; of a language model the share
of answers that are the response, the share of tokens that are the likeliest, and nats per token
that is no end; and on general text the share of answers whose first sentence is the base's, the
share of tokens whose likeliest is the base's, and the divergence from the base in nats per token.
Of a sentence embedder: the rank correlation of similarities with the scores of pairs; or the share
of texts whose partner is the nearest, or among the ten nearest. Of texts whose words have classes:
the share of words with the right class, and the F1 score of entities. Of labels that do not exclude
each other the F1 score over all of them, and the mean of those of each. Of numbers Pearson's and
Spearman's correlation with the labels, and the part of their variance that is explained. Where
tasks have different metrics, each by its own, all of which are shares.
"""

OF_EACH_TASK: Metric = "of_each_task"
"""The metric of rows in which each task has its own."""

SHARES = (
    *("accuracy", "exact_match", "token_accuracy", "base_answers", "base_agreement"),
    *("spearman", "recall_at_1", "recall_at_10"),
    *("word_accuracy", "entity_f1", "micro_f1", "macro_f1", "pearson", "r2", "of_each_task"),
)
"""The metrics that are shares, at most 1, of which more is better, and correlations."""

# Errors that named all of them twice would be cut before the end.
_METRIC: TypeAdapter[Metric] = TypeAdapter(Metric, config=ConfigDict(title="metric"))

Kind = Literal["baseline", "heads", "experts", "learned"]
"""The part that a row plays: one model that nothing was learned for, the same with heads fitted to
it, one model for each task, or the learned merge."""


class ExampleScores(NamedTuple):
    """A model's result on each of N examples of a task.

    Attributes:
        values: 1 for the right class and 0 for a wrong one, `[N]`; or the loss of an example,
            summed over its tokens, in nats; or the numerator of its part in another score.
        counts: The number of predictions that each value is a sum of, `[N]`: 1, or the number of
            predicted tokens; or the denominator of its part in another score.
        classes: The class that a classifier gives each example, `[N]`, -1 for none; None for other
            models.
    """

    values: Float[np.ndarray, " N"]
    counts: Int[np.ndarray, " N"]
    classes: Int[np.ndarray, " N"] | None = None

    @property
    def mean(self) -> float:
        """The mean over all predictions."""
        return float(self.values.sum(dtype=np.float64) / self.counts.sum())


Measures = Mapping[Metric, ExampleScores]
"""A model's results on the examples of a task, by metric."""


class Row(NamedTuple):
    """One line of the table of results.

    Attributes:
        method: Name of the model that was evaluated.
        tasks: Accuracy by task, from 0 to 1; or loss by task, in nats per token.
        metric: The meaning of these scores.
        kind: The part that the row plays.
        examples: The scores of each task's examples; None for a row that was read from a file.
        further: The same model's rows by other metrics, of all tasks or of some.

    Examples:
        >>> import adamerge_jax as am
        >>> am.Row("merge", {"a": 0.5, "b": 1.0}).average
        0.75
    """

    method: str
    tasks: dict[str, float]
    metric: Metric = "accuracy"
    kind: Kind = "baseline"
    examples: Mapping[str, ExampleScores] | None = None
    further: Sequence["Row"] = ()

    @classmethod
    def of_examples(
        cls,
        method: str,
        examples: Mapping[str, ExampleScores],
        metric: Metric,
        kind: Kind = "baseline",
    ) -> "Row":
        """Makes a row of the scores of each task's examples."""
        means = {task: task_scores.mean for task, task_scores in examples.items()}
        return cls(method, means, metric, kind, examples)

    @classmethod
    def of_measures(
        cls, method: str, measures: Mapping[str, "Measures"], kind: Kind = "baseline"
    ) -> "Row":
        """Makes a row of the scores of each task's examples by several metrics.

        Args:
            method: Name of the model.
            measures: The scores by task and metric. The metric of the row is the first one of the
                tasks, or `of_each_task` where these differ.
            kind: The part that the row plays.
        """
        by_metric: dict[Metric, dict[str, ExampleScores]] = {}
        for task, scores in measures.items():
            for metric, task_scores in scores.items():
                by_metric.setdefault(metric, {})[task] = task_scores
        first_metrics = {task: next(iter(scores)) for task, scores in measures.items()}
        first = common_metric(first_metrics.values())
        if first == OF_EACH_TASK:
            by_metric[first] = {
                task: measures[task][metric] for task, metric in first_metrics.items()
            }
        rows = {
            metric: cls.of_examples(method, by_metric[metric], metric, kind)
            for metric in get_args(Metric)
            if metric in by_metric
        }
        row = rows.pop(first)
        return row._replace(further=tuple(rows.values()))

    @property
    def average(self) -> float:
        """The mean over the tasks."""
        return float(np.mean(list(self.tasks.values())))

    @property
    def score(self) -> float:
        """The average, with its sign turned where less is better; -inf where it is not finite."""
        if not math.isfinite(self.average):
            return -math.inf
        return self.average if self.metric in SHARES else -self.average

    def as_json(self) -> dict[str, Any]:
        """Returns the fields of the row in `results.json`; a score that is not finite is null."""
        return {
            "method": self.method,
            "kind": self.kind,
            "metric": self.metric,
            "tasks": {task: _finite_or_none(score) for task, score in self.tasks.items()},
            "average": _finite_or_none(self.average),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Row":
        """Makes the row of `as_json`, or of a file from before rows had a kind.

        Raises:
            ValueError: A field has another type.
            KeyError: A field is missing.
        """
        method = TypeAdapter(str).validate_python(fields["method"])
        scores = TypeAdapter(dict[str, float | None]).validate_python(fields["tasks"])
        return cls(
            method,
            {task: math.nan if score is None else score for task, score in scores.items()},
            _METRIC.validate_python(fields["metric"]),
            TypeAdapter(Kind).validate_python(fields.get("kind", _kind_by_name(method))),
        )


def common_metric(metrics: Iterable[Metric]) -> Metric:
    """Returns the metric of a row of tasks with these: theirs, or `of_each_task` of several."""
    distinct = set(metrics)
    return distinct.pop() if len(distinct) == 1 else OF_EACH_TASK


def further_tables(rows: Sequence[Row]) -> list[list[Row]]:
    """Returns the tables by other metrics; each has the rows that were measured so.

    Args:
        rows: The table, the merge last; it decides on the metrics.
    """
    if not rows:
        return []
    return [
        [other for row in rows for other in row.further if other.metric == of_merge.metric]
        for of_merge in rows[-1].further
    ]


def best_without_learning(rows: Sequence[Row]) -> Row | None:
    """Returns the row with the best average among those that nothing was learned for."""
    candidates = [row for row in rows if row.kind == "baseline" and math.isfinite(row.average)]
    return max(candidates, key=lambda row: row.score, default=None)


def best_with_heads(rows: Sequence[Row]) -> Row | None:
    """Returns the row with the best average among those whose heads alone were fitted."""
    candidates = [row for row in rows if row.kind == "heads" and math.isfinite(row.average)]
    return max(candidates, key=lambda row: row.score, default=None)


def _kind_by_name(method: str) -> Kind:
    """Returns the kind of a row whose file does not have it, by the names that rows had then."""
    if method.startswith("experts (one model each)"):
        return "experts"
    return "learned" if method.startswith("learned (") else "baseline"


def _finite_or_none(number: float) -> float | None:
    """Returns a number for JSON, which has neither NaN nor infinity."""
    return float(number) if math.isfinite(number) else None
