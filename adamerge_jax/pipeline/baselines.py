"""The rows of the table of results: the learned merge and its baselines."""

from collections.abc import Mapping, Sequence
from functools import partial

from jaxtyping import Array
from rich.console import Console

from adamerge_jax.interference import FittedStep
from adamerge_jax.methods import (
    MergeMethod,
    average,
    make_method,
    task_arithmetic,
)
from adamerge_jax.pipeline.heads import fit_heads
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
        the further methods. Where the merge's heads are not the experts', each single model has a
        second row, with heads fitted to it.
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
    rows = [
        *_rows(inputs, "base", inputs.base),
        Row.of_measures("experts (one model each)", expert_measures, "experts"),
        *_rows(inputs, f"average{after}", _merged(inputs, average())),
        *_rows(
            inputs,
            f"task arithmetic ({coefficient:g}{origin}){after}",
            _merged(inputs, task_arithmetic(coefficient)),
        ),
        *_initial_merge_rows(inputs, settings.methods),
    ]
    for chosen in settings.methods:
        rows += _method_rows(inputs, chosen, console)
    return rows


def learned_row(inputs: LearningInputs, result: MergeResult) -> Row:
    """Evaluates the learned merge on the test data."""
    coefficients = result.coefficients
    heads = "" if coefficients.heads == "kept" else f", heads {coefficients.heads}"
    return inputs.workspace.evaluator.with_heads(result.heads).row(
        f"learned ({coefficients.granularity}{heads})",
        result.parameters(inputs.theta_start),
        inputs.workspace.data.test,
        "learned",
    )


def _rows(inputs: LearningInputs, name: str, parameters: Mapping[str, Array]) -> list[Row]:
    """Evaluates a model with the experts' heads, then with heads fitted to its features."""
    workspace, fit = inputs.workspace, inputs.method.heads.fit
    evaluator, test = workspace.evaluator, workspace.data.test
    if fit is None:
        return [evaluator.row(name, parameters, test)]
    fitted = fit_heads(workspace, parameters, inputs.calibration, fit, inputs.method.seed)
    with_fitted = evaluator.with_heads(fitted)
    heads = {name: (evaluator, "baseline"), f"{name}, heads {fit}": (with_fitted, "heads")}
    return evaluator.rows_with_heads(parameters, test, heads)


def _initial_merge_rows(inputs: LearningInputs, methods: Sequence[MethodRecipe]) -> list[Row]:
    """Evaluates the merge that learning starts from, unless it is among the methods."""
    initial = inputs.initial_merge
    rows_of_methods = {choice_in_words(method.name, method.options) for method in methods}
    if initial is None or initial.in_words in rows_of_methods:
        return []
    return _rows(inputs, initial.in_words, inputs.theta_start)


def _method_rows(
    inputs: LearningInputs, chosen: MethodRecipe, console: Console | None
) -> list[Row]:
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
    return _rows(inputs, in_words, merged)


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
