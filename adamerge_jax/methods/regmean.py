"""RegMean (Jin et al., ICLR 2023): each linear layer as the least-squares fit to all experts'."""

from collections.abc import Mapping

from jaxtyping import Array

from adamerge_jax.methods.experts import (
    average_of,
    expert_parameters,
    mean,
    set_tensor,
    tensor_with,
)
from adamerge_jax.methods.least_squares import (
    Fit,
    chunks,
    grams_of,
    linear_layers,
    require_fraction,
    scaled,
)
from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.statistics import Statistics
from adamerge_jax.task_vectors import Delta


def regmean(off_diagonal: float = 0.9) -> MergeMethod:
    """Returns the method that fits each linear layer to the experts' outputs on their own inputs.

    `W = (sum_k W_k G_k) (sum_k G_k)^-1`, where `G_k` is the Gram matrix of the inputs that the
    layer of expert k has on its own calibration data, divided by their number, its entries off the
    diagonal multiplied by `off_diagonal`. All other parameters are averaged. Where inputs leave
    `W` undetermined, it is the solution nearest to the average, in the scale of the inputs.

    On the device are one expert's parameters, and the Gram matrices of as many layers as fit into
    1 GiB; on the host are their sums, and the products with the weights.

    Args:
        off_diagonal: The factor of entries off the diagonal, from 0 to 1; the paper's is 0.9, and
            0.1 for T5.

    Source: Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR
    2023, eq. 2 and section 4.

    Raises:
        ValueError: The factor is not from 0 to 1.
    """
    require_fraction("off_diagonal", off_diagonal)

    def merge(
        base: Mapping[str, Array],
        deltas: Mapping[str, Delta],
        experts: int,
        statistics: Statistics,
    ) -> dict[str, Array]:
        merged = average_of(base, deltas, experts)
        parts = list(chunks(linear_layers(statistics, base, deltas), base))
        statistics.announce(len(parts) * experts)
        for chunk in parts:
            fits = {
                (name, number): Fit(deltas[name], experts, number)
                for name, numbers in chunk.items()
                for number in numbers
            }
            for expert in range(experts):
                parameters = expert_parameters(base, deltas, experts, expert)
                grams = grams_of(statistics, expert, parameters, chunk)
                for place, fit in fits.items():
                    fit.add(expert, scaled(grams[place], off_diagonal))
            for (name, number), fit in fits.items():
                average = tensor_with(base, deltas, name, number, mean(experts))
                merged[name] = set_tensor(merged[name], number, average + fit.solve())
        return merged

    return MergeMethod(merge, needs_data=True)
