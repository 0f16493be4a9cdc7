"""A learned merge without each of its experts: what each task owes to whom."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array
from rich.console import Console

from adamerge_jax.pipeline.learn import LearningInputs, MergeResult
from adamerge_jax.runs.counting import count_on, count_silently
from adamerge_jax.runs.rows import Metric, Row


def rows_without_experts(
    inputs: LearningInputs, result: MergeResult, metric: Metric, console: Console | None = None
) -> list[Row]:
    """Evaluates a merge on the test data once for each expert, whose coefficients are then 0.

    The other coefficients and the heads stay as they were learned.

    Args:
        inputs: The models, task vectors and data.
        result: The learned merge.
        metric: The metric of its row in the table of results.
        console: The console that shows how many examples are left.

    Returns:
        A row for each expert, by its name.
    """
    evaluator = inputs.workspace.evaluator.with_heads(result.heads)
    test, names = inputs.workspace.data.test, result.coefficients.names
    examples = len(names) * sum(map(len, test.values()))
    show = count_silently if console is None else count_on(console)
    rows = []
    with evaluator.tally.shown(show, "without each expert: examples", examples):
        for position, name in enumerate(names):
            parameters = _parameters_without(inputs, result, position)
            scores = {task: evaluator.example_scores(parameters, task, test[task]) for task in test}
            rows.append(Row.of_examples(name, scores, metric, "learned"))
    return rows


def _parameters_without(
    inputs: LearningInputs, result: MergeResult, position: int
) -> Mapping[str, Array]:
    """Returns the parameters of the merge with the coefficients of one expert at 0."""
    values = {  # [G, K, ...]
        group: jnp.asarray(array).at[:, position].set(0) for group, array in result.values.items()
    }
    return result._replace(values=values).parameters(inputs.theta_start)
