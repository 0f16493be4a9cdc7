"""TIES-Merging (Yadav et al., NeurIPS 2023): trim, elect signs, disjoint merge."""

from adamerge_jax.interference import FittedStep, trim
from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.methods.task_arithmetic import task_arithmetic


def ties(coefficient: float = 1.0, density: float = 0.2) -> MergeMethod:
    """Returns the method that adds the mean of large task vector entries that agree in sign.

    Args:
        coefficient: The factor of the merged task vector; the paper's default is 1.
        density: The fraction of each task vector's entries that is kept, the largest ones.

    Raises:
        ValueError: The density is not over 0 and up to 1.
    """
    trim(density)  # refuses what would be refused only when the merge is made
    steps = (
        FittedStep("trim", {"density": density}),
        FittedStep("elect_sign", {}),
        FittedStep("disjoint_mean", {}),
    )
    return task_arithmetic(coefficient)._replace(interference=steps)
