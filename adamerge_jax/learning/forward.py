"""A merged model run on the examples of all tasks, with the head of each."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from adamerge_jax.mixing import for_all, is_lazy
from adamerge_jax.models.family import Network, complete_head
from adamerge_jax.objectives import TaskOutputs
from adamerge_jax.stacks import Stacked, rows


class TaskGroup(NamedTuple):
    """Tasks whose outputs have the same shapes, so that one program evaluates all of them.

    Attributes:
        tasks: The positions of the tasks, G of them.
        outputs: Their outputs, `[G, B, ...]`.
        later: In place of logits in `outputs`, a function that computes those of one task from its
            row of `features`, and computes them again in the backward pass; None for none.
        features: What `later` computes the logits of tasks from, `[G, B, ...]`.
    """

    tasks: tuple[int, ...]
    outputs: TaskOutputs
    later: Callable[[PyTree], Array] | None = None
    features: PyTree[Array] = ()


Forward = Callable[[PyTree, PyTree, PyTree], Sequence[TaskOutputs] | Sequence[TaskGroup]]
"""`(parameters, heads, inputs) -> outputs` of each task, from parameters that may be mixtures.

Instead of outputs of each task there may be those of groups of tasks, which compile faster where
tasks are many, and may leave logits for later. Heads are a sequence, of which `Stacked` is one.
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

    def forward(parameters: PyTree, head_parameters: PyTree, inputs: PyTree) -> list[TaskGroup]:
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
            if cross_task:
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

        def of_group(tasks: tuple[int, ...]) -> TaskGroup:
            head, stored = heads[tasks[0]], stacks.take(tasks)
            of_examples = rows(by_task, tasks)
            if logits_again:
                features, task_states, task_mask = of_examples
                # Mixed, and gathered, once for all tasks, whose gradients add up in float32.
                shared = {n: for_all(parameters[n]) for n in head.shapes if n not in stored}
                dtypes = {n: leaf.dtype for n, leaf in shared.items() if not is_lazy(leaf)}
                shared |= {n: shared[n].astype(jnp.float32) for n in dtypes}

                def later(of_one: tuple[PyTree, PyTree]) -> Array:
                    stored, task_outputs = of_one
                    narrow = {n: shared[n].astype(dtype) for n, dtype in dtypes.items()}
                    return head(complete_head(head, stored, shared | narrow), task_outputs)

                without = TaskOutputs(None, task_states, task_mask)
                return TaskGroup(tasks, without, later, (stored, features))
            arguments = (stored, of_examples, np.array(tasks), others[np.array(tasks)])
            if len(tasks) == 1:
                only = of_task(head, *jax.tree.map(lambda array: array[0], arguments))
                return TaskGroup(tasks, jax.tree.map(lambda array: array[None], only))
            return TaskGroup(tasks, jax.vmap(partial(of_task, head))(*arguments))

        stacks = Stacked.of(head_parameters)
        return [of_group(tasks) for tasks in _with_the_same_head(heads, stacks)]

    return forward


def _with_the_same_head(heads: Sequence[Network], stacks: Stacked) -> list[tuple[int, ...]]:
    """Divides tasks into those whose heads are one function, of parameters of the same shapes.

    Zero-shot heads are one function for any number of classes.
    """
    groups: list[list[int]] = []
    for tasks in stacks.tasks:
        of_stack: list[list[int]] = []
        for task in tasks:
            alike = (group for group in of_stack if heads[group[0]].is_same(heads[task]))
            if (group := next(alike, None)) is None:
                of_stack.append([task])
            else:
                group.append(task)
        groups += of_stack
    return [tuple(group) for group in groups]
