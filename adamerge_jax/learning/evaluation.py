"""The objective of each task on its outputs; tasks that are alike are evaluated together."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from adamerge_jax.data.batches import Batch
from adamerge_jax.learning.forward import TaskGroup
from adamerge_jax.objectives import Objective, Targets, TaskOutputs
from adamerge_jax.stacks import Stacked, rows


class Evaluation(NamedTuple):
    """The results of a batch without learning from it.

    Attributes:
        objective: The objective of each task, `[tasks]`.
        predicted: By task the class that the merged model gives each example, `[B]`, or each
            position of it, `[B, T]`.
    """

    objective: Float[Array, " tasks"]
    predicted: Stacked


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
    values, predicted = [], []
    order: list[tuple[int, ...]] = []
    targets = Stacked.of(batch.targets)
    for entry in outputs:
        if not isinstance(entry, TaskGroup):
            entry = TaskGroup((len(order),), jax.tree.map(lambda array: array[None], entry))
        for tasks in _alike(entry.tasks, objectives, targets):
            places = [entry.tasks.index(task) for task in tasks]
            evaluate = partial(_evaluate_task, objectives[tasks[0]], entry.later)
            arguments = (
                rows((entry.outputs, entry.features), places),
                targets.take(tasks),
                rows(batch.weights, tasks),
            )
            if entry.later is not None:
                # The logits of one task at a time, forwards and backwards.
                run = jax.checkpoint(evaluate, prevent_cse=False)
                group_values, group_predicted = jax.lax.map(partial(_spread, run), arguments)
            elif len(tasks) == 1:
                only = evaluate(*jax.tree.map(lambda array: array[0], arguments))
                group_values, group_predicted = jax.tree.map(lambda array: array[None], only)
            else:
                group_values, group_predicted = jax.vmap(evaluate)(*arguments)
            values.append(group_values)
            predicted.append(group_predicted)
            order.append(tasks)
    return Evaluation(_by_task(values, order), Stacked(tuple(predicted), tuple(order)))


def floors_of(
    objectives: Sequence[Objective],
    weights: Float[Array, "tasks B"],
    targets: Sequence[Targets],
) -> Float[Array, " tasks"]:
    """Returns the objective of each task that is perfect.

    Args:
        objectives: The objective of each task.
        weights: The shares of examples in it.
        targets: Their targets, perhaps followed by copies.
    """
    stacks, floors = Stacked.of(targets), []
    groups = _alike(range(len(stacks)), objectives, stacks)

    def floor(objective: Objective, of_task: Targets, w: Float[Array, " B"]) -> Float[Array, ""]:
        of_examples = jax.tree.map(lambda array: array[: len(w)], of_task)
        return (w * objective.floor(of_examples)).sum()

    for tasks in groups:
        if objectives[tasks[0]].floor is None:
            floors.append(jnp.zeros(len(tasks)))
        else:
            of_task = partial(floor, objectives[tasks[0]])
            floors.append(jax.vmap(of_task)(stacks.take(tasks), rows(weights, tasks)))
    return _by_task(floors, groups)


def _by_task(
    values: Sequence[Float[Array, " G"]], groups: Sequence[tuple[int, ...]]
) -> Float[Array, " tasks"]:
    """Returns values of groups in the order of tasks."""
    order = [task for tasks in groups for task in tasks]
    return rows(jnp.concatenate(values), np.argsort(order))


def _alike(
    tasks: Sequence[int], objectives: Sequence[Objective], targets: Stacked
) -> list[tuple[int, ...]]:
    """Divides tasks into those with the same objective and targets of the same shapes."""
    groups: dict[Any, list[int]] = {}
    for task in tasks:
        groups.setdefault((id(objectives[task]), targets.group_of(task)), []).append(task)
    return [tuple(group) for group in groups.values()]


def _spread(function: Callable[..., Any], arguments: tuple) -> Any:
    return function(*arguments)


def _evaluate_task(
    objective: Objective,
    later: Callable[[PyTree], Array] | None,
    of_examples: tuple[TaskOutputs, PyTree],
    targets: Targets,
    weights: Float[Array, " B"],
) -> tuple[Float[Array, ""], Int[Array, "B ..."]]:
    """Returns the objective of one task, and the classes predicted."""
    outputs, features = of_examples
    objective.target_spec.require_given(outputs, targets)
    if later is not None:
        outputs = outputs._replace(logits=later(features))
    return (weights * objective.value(outputs, targets)).sum(), outputs.logits.argmax(-1)
