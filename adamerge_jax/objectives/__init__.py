"""What is minimised: one idea a file."""

from adamerge_jax.objectives.objective import (
    NOT_PREDICTED,
    OBJECTIVES,
    Needs,
    Objective,
    Targets,
    TaskOutputs,
    TopTokens,
    cross_entropy,
    entropy,
    hidden_state_alignment,
    logit_alignment,
    make_objective,
    pseudo_labels,
    require_given,
    token_losses,
    weighted_sum,
)

__all__ = [
    "NOT_PREDICTED",
    "OBJECTIVES",
    "Needs",
    "Objective",
    "Targets",
    "TaskOutputs",
    "TopTokens",
    "cross_entropy",
    "entropy",
    "hidden_state_alignment",
    "logit_alignment",
    "make_objective",
    "pseudo_labels",
    "require_given",
    "token_losses",
    "weighted_sum",
]
