"""SCE of FuseChat (Wan et al., EMNLP 2025): select, calculate, erase."""

from adamerge_jax.interference import FittedStep, select_variable
from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.methods.task_arithmetic import task_arithmetic


def sce(coefficient: float = 1.0, density: float = 0.1) -> MergeMethod:
    """Returns the method that averages the entries in which experts differ most, by their squares.

    `theta_base + coefficient * sum_k (w_k * m_k * tau_k) / sum_k (w_k * m_k)` on the selected
    entries, with the weights and masks of `weigh_by_squares` (Wan et al., EMNLP 2025, section 3.3).

    Args:
        coefficient: The factor of the merged task vector; the paper has none.
        density: Part of each tensor's entries that is selected, the paper's tau.

    Raises:
        ValueError: An argument is outside of its range.
    """
    select_variable(density)  # refuses what would be refused only when the merge is made
    steps = (
        FittedStep("select_variable", {"density": density}),
        FittedStep("weigh_by_squares", {}),
    )
    return task_arithmetic(coefficient)._replace(interference=steps)
