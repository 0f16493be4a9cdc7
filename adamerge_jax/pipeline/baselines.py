"""The rows of the table of results: the learned merge, and what it is compared with."""

from collections.abc import Sequence

from adamerge_jax.methods import MergeMethod, average, merged_parameters, task_arithmetic
from adamerge_jax.pipeline.evaluate import Row
from adamerge_jax.pipeline.learn import LearningInputs, MergeResult

PLAIN_TASK_ARITHMETIC = 0.3
"""Task arithmetic's coefficient where there is no labelled data to choose it with."""


def baseline_rows(inputs: LearningInputs, coefficients: Sequence[float]) -> list[Row]:
    """Evaluates what a learned merge is compared with on the test data.

    Args:
        inputs: Models, task vectors and data.
        coefficients: Those that task arithmetic chooses from where there is validation data.

    Returns:
        Rows for the base, the experts, their average, and task arithmetic with the coefficient
        that is best on the validation data.
    """
    workspace = inputs.workspace
    evaluator, test = workspace.evaluator, workspace.data.test
    after = " after interference steps" if inputs.interference else ""
    coefficient = _best_coefficient(inputs, coefficients)
    expert_scores = {}
    for task, examples in test.items():
        expert = workspace.expert(task, inputs.base)
        expert_scores[task] = evaluator.score(expert, task, examples)
    return [
        evaluator.row("base", inputs.base, test),
        Row("experts (one model each)", expert_scores, evaluator.metric),
        evaluator.row(f"average{after}", _merged(inputs, average()), test),
        evaluator.row(
            f"task arithmetic ({coefficient:g}){after}",
            _merged(inputs, task_arithmetic(coefficient)),
            test,
        ),
    ]


def learned_row(inputs: LearningInputs, result: MergeResult) -> Row:
    """Evaluates the learned merge on the test data."""
    return inputs.workspace.evaluator.row(
        f"learned ({result.coefficients.granularity})",
        result.parameters(inputs.base),
        inputs.workspace.data.test,
    )


def _best_coefficient(inputs: LearningInputs, coefficients: Sequence[float]) -> float:
    """Returns task arithmetic's best coefficient on the validation data, if there is any."""
    evaluator, validation = inputs.workspace.evaluator, inputs.workspace.data.validation
    if not validation:
        return PLAIN_TASK_ARITHMETIC

    def score(coefficient: float) -> float:
        return evaluator.row("", _merged(inputs, task_arithmetic(coefficient)), validation).score

    return max(coefficients, key=score)


def _merged(inputs: LearningInputs, method: MergeMethod) -> dict:
    return merged_parameters(method, inputs.base, inputs.deltas, inputs.experts)
