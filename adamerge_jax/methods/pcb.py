"""PCB-Merging (Du et al., NeurIPS 2024): parameter competition balancing."""

from adamerge_jax.interference import FittedStep, balance_competition
from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.methods.task_arithmetic import task_arithmetic


def pcb(coefficient: float = 1.0, density: float = 0.1) -> MergeMethod:
    """Returns the method that weighs each entry by its magnitude and agreement with others.

    `theta_base + coefficient * sum_k (w_k * tau_k) / sum_k w_k`, with the weights of
    `balance_competition` (Du et al., NeurIPS 2024, section 4).

    Args:
        coefficient: The factor of the merged task vector, the paper's lambda.
        density: Part of each expert's entries that stays, the paper's r.

    Raises:
        ValueError: An argument is outside of its range.
    """
    balance_competition(density)  # refuses what would be refused only when the merge is made
    step = FittedStep("balance_competition", {"density": density})
    return task_arithmetic(coefficient)._replace(interference=(step,))
