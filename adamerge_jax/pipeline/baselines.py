"""The rows of the table of results: the learned merge and its baselines."""

from collections.abc import Mapping, Sequence
from functools import partial

from rich.console import Console

from adamerge_jax.interference import FittedStep
from adamerge_jax.methods import (
    MergeMethod,
    average,
    make_method,
    task_arithmetic,
)
from adamerge_jax.pipeline.learn import LearningInputs, MergeResult
from adamerge_jax.pipeline.merge import method_parameters
from adamerge_jax.pipeline.read import load_task_vectors
from adamerge_jax.recipes.schema import EvaluationRecipe, MethodRecipe
from adamerge_jax.registry import choice_in_words
from adamerge_jax.runs.rows import Row
from adamerge_jax.task_vectors import Delta
from adamerge_jax.task_vectors.offload.memory import make_memory

PLAIN_TASK_ARITHMETIC = 0.3
"""Task arithmetic's coefficient where there is no labelled data to choose it with."""


def baseline_rows(
    inputs: LearningInputs, settings: EvaluationRecipe, console: Console | None = None
) -> list[Row]:
    """Evaluates the baselines of a learned merge on the test data.

    Args:
        inputs: The models, task vectors and data.
        settings: The coefficients among which task arithmetic chooses by validation data, and
            further merge methods.
        console: The console that shows how far a method is that reads calibration data.

    Returns:
        The rows of the base, the experts, their average, task arithmetic with the coefficient that
        is best on the validation data (`PLAIN_TASK_ARITHMETIC` without such data, and then its name
        does not say that it was chosen), the merge that learning starts from, if by a method, and
        the further methods.
    """
    workspace = inputs.workspace
    evaluator, test = workspace.evaluator, workspace.data.test
    after = " after interference steps" if inputs.interference else ""
    coefficient, origin = PLAIN_TASK_ARITHMETIC, ""
    if workspace.data.validation:
        coefficient = _best_coefficient(inputs, settings.task_arithmetic)
        origin = ", chosen with labels"
    # No name for an expert: it is gone before the next one is read.
    expert_measures = {
        task: evaluator.measures(workspace.expert(task, inputs.base), task, examples)
        for task, examples in test.items()
    }
    return [
        evaluator.row("base", inputs.base, test),
        Row.of_measures("experts (one model each)", expert_measures, "experts"),
        evaluator.row(f"average{after}", _merged(inputs, average()), test),
        evaluator.row(
            f"task arithmetic ({coefficient:g}{origin}){after}",
            _merged(inputs, task_arithmetic(coefficient)),
            test,
        ),
        *_initial_merge_rows(inputs, settings.methods),
        *(_method_row(inputs, chosen, console) for chosen in settings.methods),
    ]


def learned_row(inputs: LearningInputs, result: MergeResult) -> Row:
    """Evaluates the learned merge on the test data."""
    return inputs.workspace.evaluator.row(
        f"learned ({result.coefficients.granularity})",
        result.parameters(inputs.theta_start),
        inputs.workspace.data.test,
        "learned",
    )


def _initial_merge_rows(inputs: LearningInputs, methods: Sequence[MethodRecipe]) -> list[Row]:
    """Evaluates the merge that learning starts from, unless it is among the methods."""
    initial = inputs.initial_merge
    rows_of_methods = {choice_in_words(method.name, method.options) for method in methods}
    if initial is None or initial.in_words in rows_of_methods:
        return []
    workspace = inputs.workspace
    return [workspace.evaluator.row(initial.in_words, inputs.theta_start, workspace.data.test)]


def _method_row(inputs: LearningInputs, chosen: MethodRecipe, console: Console | None) -> Row:
    """Evaluates a merge method with its own interference steps, in place of the recipe's."""
    method = make_method(chosen.name, chosen.options)
    in_words = choice_in_words(chosen.name, chosen.options)
    deltas = _deltas_after(inputs, method.interference)
    merge = partial(method_parameters, inputs.workspace, method, inputs.base, deltas)
    if console is None:
        merged = merge()
    else:
        with console.status(in_words) as status:
            merged = merge(lambda line: status.update(f"{in_words}: {line}"))
    del deltas  # perhaps a second set of task vectors
    return inputs.workspace.evaluator.row(in_words, merged, inputs.workspace.data.test)


def _deltas_after(inputs: LearningInputs, steps: Sequence[FittedStep]) -> Mapping[str, Delta]:
    """Returns the task vectors after these interference steps in place of the recipe's."""
    if not steps and not inputs.interference:
        return inputs.deltas
    memory = make_memory(inputs.method.memory, inputs.devices)
    models, dtype = inputs.workspace.models, inputs.method.delta_dtype
    return load_task_vectors(models, dtype, steps, memory)[0]


def _best_coefficient(inputs: LearningInputs, coefficients: Sequence[float]) -> float:
    """Returns task arithmetic's best coefficient on the validation data."""
    evaluator, validation = inputs.workspace.evaluator, inputs.workspace.data.validation

    def score(coefficient: float) -> float:
        merged = _merged(inputs, task_arithmetic(coefficient))
        scores = {t: evaluator.example_scores(merged, t, data) for t, data in validation.items()}
        return Row.of_examples("", scores, evaluator.metric).score

    return max(coefficients, key=score)


def _merged(inputs: LearningInputs, method: MergeMethod) -> dict:
    return method_parameters(inputs.workspace, method, inputs.base, inputs.deltas)
