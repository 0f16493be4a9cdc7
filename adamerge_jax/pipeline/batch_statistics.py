"""Statistics of batch normalisation, estimated on the calibration data after a merge.

The means and variances that a batch normalisation keeps are those of the features of one model. The
features of a merge have others, which no sum of its experts' is.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from adamerge_jax.data.examples import Concatenated
from adamerge_jax.pipeline.initial_merge import merged_names
from adamerge_jax.pipeline.workspace import Workspace
from adamerge_jax.stopping import require_going_on

_BATCH = 100
"""The number of examples of a batch, at most; they are of all tasks, drawn at random."""


def with_estimated_statistics(
    workspace: Workspace,
    parameters: Mapping[str, Array],
    on_batch: Callable[[float], Any] = lambda done: None,
) -> dict[str, Array]:
    """Returns a merge whose batch normalisations keep the statistics of its own features.

    The calibration examples of all tasks are run in batches in which every normalisation takes the
    batch's statistics, as in training; kept are their means over batches, as by PyTorch's
    `torch.optim.swa_utils.update_bn`. Models that read other inputs than images, or that have no
    batch normalisation, are returned as they are; so are statistics that `keep_from_base` keeps.

    Args:
        workspace: The models and the data.
        parameters: The merge's parameters by name.
        on_batch: The function that is told the part that is done.

    Source: Jordan et al., REPAIR, ICLR 2023; Izmailov et al., Averaging Weights, UAI 2018.
    """
    models, calibration = workspace.models, workspace.data.calibration
    names = sorted(workspace.backbone.batch_statistics.intersection(merged_names(models)))
    if not names or models.family.language or models.family.inputs[0] != "pixel_values":
        return dict(parameters)
    # Nothing is computed again: only forward passes are run.
    network = models.family.build_backbone(models.config, "nothing")
    statistics_of = jax.jit(network.statistics_of)
    examples = Concatenated(list(calibration.values()))
    batches = _batches(len(examples))
    sums: dict[str, Any] = {}
    for number, index in enumerate(batches, start=1):
        require_going_on()
        inputs = examples.take(index, examples.padded_length(index))
        read = statistics_of(parameters, models.devices.examples(inputs))
        sums = {name: sums.get(name, 0) + read[name] for name in names}
        on_batch(number / len(batches))
    estimated = {
        name: models.devices.parameter(name, np.asarray(total / len(batches)))
        for name, total in sums.items()
    }
    return {**parameters, **estimated}


def _batches(examples: int) -> list[Int[np.ndarray, " B"]]:
    """Returns the indices of batches of one size, which leave out less than one for each batch."""
    number = -(-examples // _BATCH)
    size = examples // number
    order = np.random.default_rng(0).permutation(examples)
    return np.split(order[: number * size], number)
