"""LiNeS (Wang et al., ICLR 2025): a factor that grows linearly with the depth of a layer."""

from adamerge_jax.interference import FittedStep, scale_by_depth
from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.methods.task_arithmetic import task_arithmetic


def lines(
    first: float | None = None, increase: float = 0.5, layers: int | None = None
) -> MergeMethod:
    """Returns the method that adds task vectors times a factor that grows with the depth.

    `theta_base + (first + increase * l / (L - 1)) * sum_k tau_k` in layer l of L, and
    `theta_base + first * sum_k tau_k` outside of layers (Wang et al., ICLR 2025, section 4).

    Args:
        first: Factor of the first layer, the paper's alpha; by default 1 / K.
        increase: The increase up to the last layer, the paper's beta.
        layers: The least number of layers of a stack; by default they are counted up to the last
            one that an expert changes.

    Raises:
        ValueError: An argument is outside of its range.
    """
    scale_by_depth(first, increase, layers)  # refuses what would be refused only in the merge
    options = {"first": first, "increase": increase, "layers": layers}
    step = FittedStep("scale_by_depth", options)
    return task_arithmetic(1.0)._replace(interference=(step,))
