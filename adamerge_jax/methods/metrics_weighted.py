"""Metrics-weighted averaging (Yu and Choi, 2025): experts weighted by a loss."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Array

from adamerge_jax.methods.experts import expert_parameters, weighted
from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.mixing import Mixture
from adamerge_jax.statistics import Statistics
from adamerge_jax.task_vectors import Delta


def metrics_weighted(penalty: float = 1.0) -> MergeMethod:
    """Returns the average of the experts with weights `L_k^-penalty / sum_j L_j^-penalty`.

    `L_k` is the mean loss of expert k on the calibration data of all tasks, with each task's own
    head: the entropy of a classifier's predictions, or the cross-entropy of the tokens of texts. No
    label is read. An expert that serves all tasks well counts for more. Held is one expert.

    Args:
        penalty: The exponent; 0 is the plain average.

    Source: after Yu and Choi, "Parameter-Efficient Checkpoint Merging via Metrics-Weighted
    Averaging", 2025, who weigh the checkpoints of one run by their training loss.

    Raises:
        ValueError: The penalty is not from 0 to 100.
    """
    if not 0 <= penalty <= 100:
        raise ValueError(f"penalty is {penalty}, expected from 0 to 100")

    def merge(
        base: Mapping[str, Array],
        deltas: Mapping[str, Delta],
        experts: int,
        statistics: Statistics,
    ) -> dict[str, Array | Mixture]:
        statistics.announce(experts**2)
        losses = np.zeros(experts)
        for expert in range(experts):
            parameters = expert_parameters(base, deltas, experts, expert)
            tasks = [statistics.loss(task, parameters) for task in range(experts)]
            losses[expert] = np.mean(tasks)
        # Logarithms, because a power of a small loss may be more than a number holds.
        logarithms = -penalty * np.log(np.maximum(losses, np.finfo(np.float32).tiny))
        weights = np.exp(logarithms - logarithms.max())
        changed = {name: base[name] for name in deltas}
        return weighted(changed, deltas, weights / weights.sum())

    return MergeMethod(merge, needs_data=True, needs_predictions=True)
