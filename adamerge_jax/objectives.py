"""What is minimised: pure functions from a task's outputs to one value per example.

The value of a task is the mean over its examples, the value of a step the sum over its tasks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class TaskOutputs(NamedTuple):
    """What the merged model says about one task's examples.

    Attributes:
        logits: `[B, C]`, from the task's own head.
        hidden_states: `[L + 1, B, T, H]`, or None where no objective asks for them.
    """

    logits: Float[Array, "B C"]
    hidden_states: Float[Array, "L+1 B T H"] | None = None


class Targets(NamedTuple):
    """What a task's examples are compared with, where an objective asks for it.

    Attributes:
        expert_logits: `[B, C]`, what the task's own expert says, or None.
    """

    expert_logits: Float[Array, "B C"] | None = None


class Objective(NamedTuple):
    """What is minimised.

    Attributes:
        value: `(outputs, targets) -> one value per example [B]`.
        needs_expert: Whether the targets must hold the expert's logits.
    """

    value: Callable[[TaskOutputs, Targets], Float[Array, " B"]]
    needs_expert: bool = False


def entropy(outputs: TaskOutputs, targets: Targets) -> Float[Array, " B"]:
    """Shannon entropy of the predicted class distribution, in nats (AdaMerging, eq. 7)."""
    log_probabilities = jax.nn.log_softmax(outputs.logits.astype(jnp.float32))
    return -(jnp.exp(log_probabilities) * log_probabilities).sum(-1)


def logit_alignment(outputs: TaskOutputs, targets: Targets) -> Float[Array, " B"]:
    """Cross-entropy from the expert's class distribution to the merged model's, in nats.

    The same gradient as the Kullback-Leibler divergence (Hinton et al., 2015, temperature 1).
    """
    assert targets.expert_logits is not None
    expert = jax.nn.softmax(targets.expert_logits.astype(jnp.float32))
    return -(expert * jax.nn.log_softmax(outputs.logits.astype(jnp.float32))).sum(-1)


OBJECTIVES: Mapping[str, Objective] = {
    "entropy": Objective(entropy),
    "logit_alignment": Objective(logit_alignment, needs_expert=True),
}
"""Objectives by their names in a recipe."""


def weighted_sum(terms: Sequence[tuple[float, Objective]]) -> Objective:
    """The objective `sum_i weight_i * objective_i`."""
    return Objective(
        lambda outputs, targets: sum(
            weight * objective.value(outputs, targets) for weight, objective in terms
        ),
        needs_expert=any(objective.needs_expert for _, objective in terms),
    )
