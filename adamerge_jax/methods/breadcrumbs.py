"""Model Breadcrumbs (Davari and Belilovsky, ECCV 2024): no small entries and no outliers."""

from adamerge_jax.interference import FittedStep, drop_extremes
from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.methods.task_arithmetic import task_arithmetic


def breadcrumbs(
    coefficient: float = 0.3, smallest: float = 0.85, largest: float = 0.01
) -> MergeMethod:
    """Returns the method that adds task vectors without their smallest and largest entries.

    `theta_base + coefficient * sum_k m_k * tau_k`, where the mask `m_k` drops entries of a tensor
    by their magnitude (Davari and Belilovsky, ECCV 2024, section 3).

    Args:
        coefficient: The coefficient of all experts and parameters, the paper's alpha.
        smallest: Part of the entries that is dropped because they are small, the paper's beta.
        largest: Part of the entries that is dropped because they are large, the paper's
            1 - gamma.

    Raises:
        ValueError: An argument is outside of its range.
    """
    drop_extremes(smallest, largest)  # refuses what would be refused only when the merge is made
    step = FittedStep("drop_extremes", {"smallest": smallest, "largest": largest})
    return task_arithmetic(coefficient)._replace(interference=(step,))
