"""The objectives of learning: one idea a file.

An objective is a pure function from a task's outputs and targets to one value per example. It is
made by a function of its options. The value of a task is the mean over its B examples, `[B]`, the
value of a step the sum over its tasks. A language model predicts a class, the next token, at each
of T positions; an example's value is the mean over those that count. To use one of your own, pass
it to `make_learner`, or name it in a recipe as `package.module:function`.

Examples:
    >>> import jax.numpy as jnp
    >>> from adamerge_jax.objectives import Targets, TaskOutputs, entropy
    >>> outputs = TaskOutputs(logits=jnp.array([[0.0, 0.0], [9.0, -9.0]]))  # [B, C]
    >>> print(entropy().value(outputs, Targets()).round(2))  # [B], in nats
    [0.69 0.  ]
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from adamerge_jax.objectives.contrastive import contrastive
from adamerge_jax.objectives.cross_entropy import cross_entropy
from adamerge_jax.objectives.distributions import token_losses
from adamerge_jax.objectives.embedding_alignment import embedding_alignment
from adamerge_jax.objectives.entropy import entropy
from adamerge_jax.objectives.expert_labels import expert_labels
from adamerge_jax.objectives.hidden_state_alignment import hidden_state_alignment
from adamerge_jax.objectives.logit_alignment import logit_alignment
from adamerge_jax.objectives.objective import Objective, weighted_sum
from adamerge_jax.objectives.output_alignment import output_alignment
from adamerge_jax.objectives.pseudo_labels import pseudo_labels
from adamerge_jax.objectives.squared_error import squared_error
from adamerge_jax.objectives.targets import (
    NOT_PREDICTED,
    CrossTaskTargets,
    Targets,
    TargetSpec,
    TaskOutputs,
    TopTokens,
)
from adamerge_jax.registry import call_registered

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "entropy": entropy,
    "logit_alignment": logit_alignment,
    "hidden_state_alignment": hidden_state_alignment,
    "cross_entropy": cross_entropy,
    "pseudo_labels": pseudo_labels,
    "expert_labels": expert_labels,
    "output_alignment": output_alignment,
    "squared_error": squared_error,
    "embedding_alignment": embedding_alignment,
    "contrastive": contrastive,
}
"""Objectives by their names in a recipe."""

__all__ = [
    "NOT_PREDICTED",
    "OBJECTIVES",
    "CrossTaskTargets",
    "Objective",
    "TargetSpec",
    "Targets",
    "TaskOutputs",
    "TopTokens",
    "contrastive",
    "cross_entropy",
    "embedding_alignment",
    "entropy",
    "expert_labels",
    "hidden_state_alignment",
    "logit_alignment",
    "make_objective",
    "output_alignment",
    "pseudo_labels",
    "require_given",
    "squared_error",
    "token_losses",
    "weighted_sum",
]

require_given = TargetSpec.require_given


def make_objective(name: str, options: Mapping[str, Any]) -> Objective:
    """Makes the objective that a recipe names.

    Args:
        name: A key of `OBJECTIVES`, or `package.module:function`.
        options: Arguments of the function.

    Raises:
        InputError: There is no such objective, or it refuses an option.

    Examples:
        >>> from adamerge_jax.objectives import make_objective
        >>> make_objective("logit_alignment", {"temperature": 2.0}).target_spec.expert_logits
        True
    """
    return call_registered("objectives", OBJECTIVES, name, options, returns=Objective)


def _needs(
    expert_logits: bool = False,
    labels: bool = False,
    strong_view: bool = False,
    hidden_states: tuple[int, ...] = (),
    elsewhere: int = 0,
    top_tokens: int | None = None,
    whole_batch: bool = False,
) -> TargetSpec:
    """Makes a specification of targets from its old arguments."""
    return TargetSpec(
        expert_logits, labels, strong_view, hidden_states, elsewhere, top_tokens, whole_batch
    )


def __getattr__(name: str) -> Any:
    if name == "Needs":
        warnings.warn("objectives.Needs is now TargetSpec", DeprecationWarning, stacklevel=2)
        return _needs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
