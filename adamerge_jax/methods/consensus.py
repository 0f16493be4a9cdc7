"""Consensus Merging (Wang et al., ICML 2024): the sum of task vectors where experts share it."""

from adamerge_jax.interference import FittedStep, consensus_mask
from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.methods.task_arithmetic import task_arithmetic


def consensus(coefficient: float = 0.3, threshold: float = 0.4, users: int = 2) -> MergeMethod:
    """Returns the method that adds the task vectors' entries which several experts use.

    `theta_base + coefficient * m * sum_k tau_k`, where the mask m is that of `consensus_mask`
    (Wang et al., ICML 2024, section 4.3).

    Args:
        coefficient: The coefficient of all experts and parameters.
        threshold: The threshold of the TALL masks, the paper's lambda.
        users: The number of masks that an entry has to be in, the paper's k.

    Raises:
        ValueError: An argument is outside of its range.
    """
    consensus_mask(threshold, users)  # refuses what would be refused only when the merge is made
    step = FittedStep("consensus_mask", {"threshold": threshold, "users": users})
    return task_arithmetic(coefficient)._replace(interference=(step,))
