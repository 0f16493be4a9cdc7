"""A merged model run on the examples of all tasks, with the head of each."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from adamerge_jax.learning.stacks import rows, stacked
from adamerge_jax.models.family import Network, complete_head
from adamerge_jax.objectives import TaskOutputs


class TaskGroup(NamedTuple):
    """Tasks whose outputs have the same shapes, so that one program evaluates all of them.

    Attributes:
        tasks: The positions of the tasks, G of them.
        outputs: Their outputs, `[G, B, ...]`.
    """

    tasks: tuple[int, ...]
    outputs: TaskOutputs


Forward = Callable[[PyTree, PyTree, PyTree], Sequence[TaskOutputs] | Sequence[TaskGroup]]
"""`(parameters, heads, inputs) -> outputs` of each task, from parameters that may be mixtures.

In place of a task's logits there may be a function that computes them. Instead of outputs of each
task there may be those of groups of tasks, which compile faster where tasks are many.
"""


def forward_with_heads(
    backbone: Network,
    heads: Sequence[Network],
    hidden_states: Sequence[int] = (),
    cross_task: bool = False,
    logits_again: bool = False,
    embeds: bool = False,
) -> Forward:
    """Returns a forward function that runs one backbone on all examples, then each task's head.

    Args:
        backbone: From parameters and inputs `[tasks * B, ...]` to outputs.
        heads: One per task, from its parameters and the outputs of its B examples to logits.
        hidden_states: Layers whose hidden states the outputs are to hold.
        cross_task: True if they are to hold each head's logits on the other tasks' examples.
        logits_again: True if a task's logits are computed again in the backward pass rather than
            kept: those of a language model are the largest arrays of a step.
        embeds: True if the heads give a sentence embedder's embeddings in place of logits.
    """
    others = np.array([[o for o in range(len(heads)) if o != task] for task in range(len(heads))])

    def forward(
        parameters: PyTree, head_parameters: PyTree, inputs: PyTree
    ) -> list[TaskOutputs] | list[TaskGroup]:
        outputs = backbone(parameters, inputs, hidden_states=bool(hidden_states))
        mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
        states = {layer: outputs.hidden_states[layer] for layer in hidden_states}
        outputs = outputs._replace(hidden_states=None, cache=None)
        by_task = jax.tree.map(
            lambda array: array.reshape(len(heads), -1, *array.shape[1:]), (outputs, states, mask)
        )

        def of_task(
            head: Network, stored: PyTree, of_examples: PyTree, task: Any, rest: Any
        ) -> TaskOutputs:
            complete = complete_head(head, stored, parameters)
            task_outputs, task_states, task_mask = of_examples
            logits_of_others = None
            if logits_again:
                logits = partial(head, complete, task_outputs)
            elif cross_task:
                logits_of_all = head(complete, outputs)
                logits_of_all = logits_of_all.reshape(len(heads), -1, *logits_of_all.shape[1:])
                logits, logits_of_others = logits_of_all[task], logits_of_all[rest].swapaxes(0, 1)
            else:
                logits = head(complete, task_outputs)
            return TaskOutputs(
                jnp.zeros((len(logits), 1)) if embeds else logits,
                task_states,
                task_mask,
                cross_task_logits=logits_of_others,
                embeddings=logits if embeds else None,
            )

        def of_one(task: int) -> TaskOutputs:
            of_examples = jax.tree.map(lambda array: array[task], by_task)
            return of_task(heads[task], head_parameters[task], of_examples, task, others[task])

        def of_group(tasks: tuple[int, ...]) -> TaskOutputs:
            if len(tasks) == 1:
                return jax.tree.map(lambda array: array[None], of_one(tasks[0]))
            return jax.vmap(partial(of_task, heads[tasks[0]]))(
                stacked([head_parameters[task] for task in tasks]),
                rows(by_task, tasks, len(heads)),
                np.array(tasks),
                others[np.array(tasks)],
            )

        if logits_again:
            return [of_one(task) for task in range(len(heads))]
        groups = _with_the_same_head(heads, head_parameters)
        return [TaskGroup(tasks, of_group(tasks)) for tasks in groups]

    return forward


def _with_the_same_head(
    heads: Sequence[Network], head_parameters: Sequence[PyTree]
) -> list[tuple[int, ...]]:
    """Divides tasks into those whose heads are one function, of parameters of the same shapes.

    Zero-shot heads are one function for any number of classes.
    """
    shapes = [jax.tree.map(jnp.shape, parameters) for parameters in head_parameters]
    groups: list[list[int]] = []
    for task, head in enumerate(heads):
        alike = (
            group
            for group in groups
            if heads[group[0]].is_same(head) and shapes[group[0]] == shapes[task]
        )
        if (group := next(alike, None)) is None:
            groups.append([task])
        else:
            group.append(task)
    return [tuple(group) for group in groups]
