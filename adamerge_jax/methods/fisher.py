"""Fisher merging (Matena and Raffel, NeurIPS 2022): averages weighted by the Fisher information."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

from adamerge_jax.methods.experts import average_of, expert_parameters
from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.methods.parts import in_parts
from adamerge_jax.statistics import Statistics
from adamerge_jax.task_vectors import Delta

FISHER_BYTES = 2**31
"""The size up to which the Fisher information of several parameters is held together."""


def fisher(samples: int = 0, seed: int = 0) -> MergeMethod:
    """Returns the method `sum_k F_k theta_k / sum_k F_k`, entry by entry.

    `F_k` is the diagonal Fisher information of expert k on its own calibration data:

        F_k = mean over x of E_{y ~ p_k(y | x)} (d log p_k(y | x) / d theta)^2

    with labels that are the expert's own predictions. Where it is 0 for all experts, they are
    averaged. On the device are one expert's parameters, and for at most 2 GiB of parameters at a
    time its Fisher information, the gradient of one example, and the two sums.

    Args:
        samples: The number of labels drawn for each example; 0 for the expectation over all classes
            of a classifier. A language model has one sampled text, unless more are asked for.
        seed: Decides on the draws.

    Source: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, eqs. 3
    and 4. The authors' code also divides each expert's information by its norm, and raises small
    values to 1e-6.

    Raises:
        ValueError: An option is negative.
    """
    for option, value in (("samples", samples), ("seed", seed)):
        if value < 0:
            raise ValueError(f"{option} is {value}, expected 0 or more")

    def merge(
        base: Mapping[str, Array],
        deltas: Mapping[str, Delta],
        experts: int,
        statistics: Statistics,
    ) -> dict[str, Array]:
        average = average_of(base, deltas, experts)
        merged = {}
        chunks = list(in_parts(deltas, lambda name: 4 * base[name].size, FISHER_BYTES))
        statistics.announce(len(chunks) * experts)
        for names in chunks:
            total = {name: jnp.zeros(base[name].shape, jnp.float32) for name in names}
            # Of differences from the average, which is what is left where all weights are 0.
            weighted = dict(total)
            for expert in range(experts):
                parameters = expert_parameters(base, deltas, experts, expert)
                information = statistics.fisher(
                    expert, parameters, names, samples=samples, seed=seed
                )
                for name, weight in information.items():
                    difference = parameters[name].astype(jnp.float32) - average[name]
                    total[name] += weight
                    weighted[name] += weight * difference
            for name in names:
                known = total[name] > 0
                change = jnp.where(known, weighted[name] / jnp.where(known, total[name], 1), 0)
                merged[name] = (average[name] + change).astype(base[name].dtype)
        return merged

    return MergeMethod(merge, needs_data=True, needs_predictions=True)
