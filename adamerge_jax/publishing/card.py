"""The model card of a merge on the Hub: that of the checkpoint, with scores as metadata."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from adamerge_jax.runs.results import Results
from adamerge_jax.runs.rows import Metric

_METRICS: Mapping[Metric, tuple[str, str]] = {
    "accuracy": ("accuracy", "accuracy"),
    "loss": ("loss", "loss in nats per token"),
    "exact_match": ("exact_match", "exact match"),
    "spearman": ("spearman", "Spearman's correlation"),
    "recall_at_1": ("recall", "recall at 1"),
    "word_accuracy": ("accuracy", "accuracy of words"),
    "entity_f1": ("f1", "F1 of entities"),
}
"""The type and the name of metrics in the Hub's metadata; of others nothing is told."""

_ANY_TASK = "other"
"""The Hub's word for a purpose that it has no word for."""


def published_card(card: str, repository: str, results: Results) -> str:
    """Returns the card of a checkpoint as the Hub is to show it.

    Args:
        card: The README.md of the checkpoint.
        repository: The id of the model on the Hub, which its code example then loads.
        results: The table of results, the merge last; its scores become a `model-index`.
    """
    parsed = ModelCard(card.replace('"PATH"', f'"{repository}"'), ignore_metadata_errors=True)
    data: Any = parsed.data
    scores = list(_scores(results, data.get("pipeline_tag") or _ANY_TASK))
    if scores:
        data.model_name = repository.rpartition("/")[2]
        data.eval_results = scores
    return str(parsed)


def _scores(results: Results, purpose: str) -> Iterator[EvalResult]:
    """Yields the merge's finite scores of each task, by every metric that the Hub knows."""
    for table in results.tables:
        if table.rows[-1].metric not in _METRICS:
            continue
        merge = table.rows[-1]
        metric, name = _METRICS[merge.metric]
        for task, score in merge.tasks.items():
            if math.isfinite(score):
                yield EvalResult(
                    task_type=purpose,
                    dataset_type=task,
                    dataset_name=f"test data of the task {task}",
                    metric_type=metric,
                    metric_name=name,
                    metric_value=round(score, 4),
                )
    for line in results.harness.lines() if results.harness else ():
        value = line.scores[-1].value
        if value is not None:
            yield EvalResult(
                task_type=purpose,
                dataset_type=line.task,
                dataset_name=line.task,
                metric_type=line.scores[-1].metric,
                metric_name=f"{line.metric}, by lm-eval {results.harness.version}",
                metric_value=round(value, 4),
            )
