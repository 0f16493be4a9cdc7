"""OPCM (Tang et al., 2025): experts that come one after the other, each projected apart."""

from adamerge_jax.interference import FittedStep, project_apart
from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.methods.task_arithmetic import task_arithmetic


def opcm(threshold: float = 0.5) -> MergeMethod:
    """Returns the method that sums task vectors, each projected away from those before it.

    See `adamerge_jax.interference.project_apart`, which is this method's step.

    Args:
        threshold: The part of the singular values' sum that the leading directions have, from 0 to
            1; the paper's alpha, 0.5 there.

    Raises:
        ValueError: The threshold is not from 0 to 1.
    """
    project_apart(threshold)  # refuses what would be refused only when the merge is made
    step = FittedStep("project_apart", {"threshold": threshold})
    return task_arithmetic(1.0)._replace(interference=(step,))
