"""The objective of each task on its outputs; tasks that are alike are evaluated together."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adamerge_jax.data.batches import Batch
from adamerge_jax.learning.forward import TaskGroup
from adamerge_jax.learning.stacks import rows, stacked
from adamerge_jax.objectives import Objective, Targets, TaskOutputs


class Evaluation(NamedTuple):
    """The results of a batch without learning from it.

    Attributes:
        objective: The objective of each task, `[tasks]`.
        predicted: By task the class that the merged model gives each example, `[B]`, or each
            position of it, `[B, T]`.
    """

    objective: Float[Array, " tasks"]
    predicted: Sequence[Int[Array, "B ..."]]


def with_augmented(
    plain: TaskOutputs | TaskGroup, augmented: TaskOutputs | TaskGroup
) -> TaskOutputs | TaskGroup:
    """Returns outputs with the logits of the augmented examples."""
    if isinstance(plain, TaskGroup):
        return plain._replace(outputs=with_augmented(plain.outputs, augmented.outputs))
    return plain._replace(augmented_logits=augmented.logits)


def evaluate_tasks(
    objectives: Sequence[Objective], outputs: Sequence[TaskOutputs | TaskGroup], batch: Batch
) -> Evaluation:
    """Returns the objective of each task, and the classes predicted."""
    values: dict[int, Float[Array, ""]] = {}
    predicted: dict[int, Int[Array, "B ..."]] = {}
    for entry in outputs:
        if not isinstance(entry, TaskGroup):
            task = len(values)
            values[task], predicted[task] = _evaluate_task(
                objectives[task], entry, batch.targets[task], batch.weights[task]
            )
            continue
        for tasks in _alike(entry.tasks, [(objectives[t], batch.targets[t]) for t in entry.tasks]):
            places = [entry.tasks.index(task) for task in tasks]
            group_values, group_predicted = jax.vmap(partial(_evaluate_task, objectives[tasks[0]]))(
                rows(entry.outputs, places, len(entry.tasks)),
                stacked([batch.targets[task] for task in tasks]),
                rows(batch.weights, tasks, len(objectives)),
            )
            values |= zip(tasks, group_values, strict=True)
            predicted |= zip(tasks, group_predicted, strict=True)
    order = range(len(objectives))
    return Evaluation(jnp.stack([values[t] for t in order]), [predicted[t] for t in order])


def _alike(
    tasks: Sequence[int], contents: Sequence[tuple[Objective, Targets]]
) -> list[tuple[int, ...]]:
    """Divides tasks into those with the same objective and targets of the same shapes."""
    groups: dict[Any, list[int]] = {}
    for task, (objective, targets) in zip(tasks, contents, strict=True):
        leaves, structure = jax.tree.flatten(targets)
        form = (id(objective), structure, *((leaf.shape, leaf.dtype) for leaf in leaves))
        groups.setdefault(form, []).append(task)
    return [tuple(group) for group in groups.values()]


def _evaluate_task(
    objective: Objective, outputs: TaskOutputs, targets: Targets, weights: Float[Array, " B"]
) -> tuple[Float[Array, ""], Int[Array, "B ..."]]:
    """Returns the objective of one task, and the classes predicted."""
    objective.target_spec.require_given(outputs, targets)

    def evaluate() -> tuple[Array, Array]:
        computed = outputs
        if callable(outputs.logits):
            computed = outputs._replace(logits=outputs.logits())
        return (weights * objective.value(computed, targets)).sum(), computed.logits.argmax(-1)

    # Logits that come as a function are those of one task at a time, forwards and backwards.
    return jax.checkpoint(evaluate)() if callable(outputs.logits) else evaluate()
