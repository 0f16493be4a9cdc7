"""DARE with task arithmetic (Yu et al., ICML 2024): drop entries at random, rescale the others."""

from adamerge_jax.interference import FittedStep, drop_and_rescale
from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.methods.task_arithmetic import task_arithmetic


def dare(coefficient: float = 0.3, drop: float = 0.9, seed: int = 0) -> MergeMethod:
    """Returns the method that adds task vectors of which random entries are dropped.

    `theta_base + coefficient * sum_k (m_k * tau_k) / (1 - drop)`, where an entry of the mask `m_k`
    is 0 with the probability `drop` (Yu et al., ICML 2024, section 3.1).

    Args:
        coefficient: The coefficient (lambda) of all experts and parameters.
        drop: Probability with which an entry is dropped, from 0 and under 1.
        seed: Seed of the draw.

    Raises:
        ValueError: An argument is outside of its range.
    """
    drop_and_rescale(drop, seed)  # refuses what would be refused only when the merge is made
    step = FittedStep("drop_and_rescale", {"drop": drop, "seed": seed})
    return task_arithmetic(coefficient)._replace(interference=(step,))
