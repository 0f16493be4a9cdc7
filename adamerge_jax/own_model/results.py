"""The table of results of models in memory: base, experts, merges without learning, the merge."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from adamerge_jax.data.arrays import ArrayExamples
from adamerge_jax.data.examples import sorted_batches
from adamerge_jax.devices import fetch
from adamerge_jax.errors import InputError
from adamerge_jax.own_model.leaves import Leaves
from adamerge_jax.pipeline.predictions import predictions_on_test
from adamerge_jax.runs.predictions import Predictions
from adamerge_jax.runs.results import Results
from adamerge_jax.runs.rows import ExampleScores, Kind, Row

Logits = Callable[[Mapping[str, Array], Mapping[str, np.ndarray]], Array]
"""From all arrays of a model and the inputs of B examples to their logits, `[B, C]`."""

TASK_ARITHMETIC = 0.3
"""The coefficient of task arithmetic that the merge is compared with."""


def require_classes(test: Mapping[str, ArrayExamples]) -> None:
    """Refuses test data that have no accuracy.

    Raises:
        InputError: Labels are missing, are not one for each example, or one of them is no class.
    """
    for task, examples in test.items():
        if examples.labels is None or examples.labels.ndim != 1:
            raise InputError(
                f"test: {task!r} has no class for each example; give a tuple (inputs, labels) with "
                "labels [N]"
            )
        if examples.labels.min() < 0:
            row = int(examples.labels.argmin())
            raise InputError(
                f"test: {task!r} has the label {examples.labels[row]} in row {row}, which is no "
                "class; leave such examples out"
            )


def measure_results(
    logits: Logits,
    base: Leaves[Any],
    experts: Mapping[str, Leaves[Any]],
    mixed: Mapping[str, object],
    merged: Mapping[str, Array],
    heads: Mapping[str, Mapping[str, Array]],
    test: Mapping[str, ArrayExamples],
    batch_size: int,
    name: str,
) -> Results:
    """Measures the accuracies of all models.

    Args:
        logits: Runs a model, compiled.
        base: The base.
        experts: The experts by task.
        mixed: The names of the parameters that are mixed.
        merged: All arrays of the merge.
        heads: The parameters that each task keeps in the merge, by task and name.
        test: Labelled examples by task.
        batch_size: Examples per call.
        name: The name of the merge in the table.
    """

    def row(method: str, arrays: Callable[[str], Mapping[str, Array]], kind: Kind) -> Row:
        scores = {
            task: _scores(logits, arrays(task), examples, batch_size)
            for task, examples in test.items()
        }
        return Row.of_examples(method, scores, "accuracy", kind)

    def with_head(arrays: Mapping[str, Array], task: str) -> Mapping[str, Array]:
        # Of models without learning a task keeps the expert's own.
        return {**arrays, **{head: experts[task].parameters[head] for head in heads[task]}}

    rows = [
        row("base", lambda task: with_head(base.arrays, task), "baseline"),
        row("experts (one model each)", lambda task: experts[task].arrays, "experts"),
    ]
    for method, weight in _without_learning(len(experts)):
        arrays = {**base.arrays, **dict(_summed(base, experts, mixed, weight))}
        rows.append(row(method, lambda task, arrays=arrays: with_head(arrays, task), "baseline"))
    rows.append(row(name, lambda task: {**merged, **heads[task]}, "learned"))
    return Results.of_rows(rows)


def predictions_in_memory(test: Mapping[str, ArrayExamples], results: Results) -> Predictions:
    """Returns what the merge takes for what; classes are numbers, and examples are not shown."""
    return predictions_on_test(
        test, results.rows, lambda task: [], lambda: lambda examples, position: (None, None)
    )


def _without_learning(experts: int) -> list[tuple[str, float]]:
    return [
        ("average", 1 / experts),
        (f"task arithmetic ({TASK_ARITHMETIC:g})", TASK_ARITHMETIC),
    ]


def _summed(
    base: Leaves[Any],
    experts: Mapping[str, Leaves[Any]],
    mixed: Mapping[str, object],
    weight: float,
) -> Iterator[tuple[str, Array]]:
    """Yields the base's parameters plus a multiple of the sum of all task vectors."""
    for name in mixed:
        start = jnp.asarray(base.parameters[name], jnp.float32)
        total = start
        for expert in experts.values():
            total = total + weight * (jnp.asarray(expert.parameters[name], jnp.float32) - start)
        yield name, total.astype(base.parameters[name].dtype)


def _scores(
    logits: Logits, arrays: Mapping[str, Array], examples: ArrayExamples, batch_size: int
) -> ExampleScores:
    """Returns 1 for each example with the right class, and 0 for others."""
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    classes = np.full(len(examples), -1, np.int32)
    for index, inputs in sorted_batches(examples, min(batch_size, len(examples))):
        outputs = fetch(logits(arrays, inputs))[: len(index)]
        # NaN would be class 0 to NumPy.
        classes[index] = np.where(np.isnan(outputs).any(-1), -1, outputs.argmax(-1))
    is_right = (classes == examples.labels).astype(np.float32)
    return ExampleScores(is_right, np.ones(len(examples), np.int32), classes)
