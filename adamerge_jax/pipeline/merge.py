"""The merged parameters of a method that learns nothing: for a file, for a table, for a start."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Float, PyTree

from adamerge_jax.coefficients.initial_merge import InitialMerge
from adamerge_jax.data.examples import Examples, sorted_batches
from adamerge_jax.methods import MergeMethod, merged_parameters
from adamerge_jax.models.family import Network, complete_head
from adamerge_jax.pipeline.batch_statistics import with_estimated_statistics
from adamerge_jax.pipeline.initial_merge import merged_names, method_of, only_mixed
from adamerge_jax.pipeline.read import load_task_vectors
from adamerge_jax.pipeline.workspace import Workspace
from adamerge_jax.statistics import CalibrationBatch, Statistics, TaskData
from adamerge_jax.stopping import require_going_on
from adamerge_jax.task_vectors import Delta
from adamerge_jax.task_vectors.offload.memory import Memory

Report = Callable[[str], Any]
"""The function that shows how far a method has got, in a line."""


def method_parameters(
    workspace: Workspace,
    method: MergeMethod,
    base: Mapping[str, Array],
    deltas: Mapping[str, Delta],
    report: Report = lambda line: None,
) -> dict[str, Array]:
    """Merges by a method, with the calibration data of the recipe where the method needs it.

    Args:
        workspace: The models and the data.
        method: The method; its interference steps have changed `deltas` already.
        base: The parameters of the base by name.
        deltas: The task vectors of the experts.
        report: Shows how much is done of what calibration data is read for, and the time left.

    Returns:
        The merged model's parameters by name, in the dtype of the base; statistics of batch
        normalisation are estimated, see `with_estimated_statistics`.
    """
    models = workspace.models
    if method.needs_data:
        statistics = open_statistics(workspace, report)
        merged = merged_parameters(method, base, deltas, len(models.experts), statistics)
        # Fits of a stack's layers reach those that `keep_from_base` keeps; their changes are 0.
        merged = only_mixed(models, merged, base, merged_names(models))
    else:
        merged = merged_parameters(method, base, deltas, len(models.experts))
    return with_estimated_statistics(workspace, merged, _timed(report))


def merge_from_data(
    workspace: Workspace,
    initial: InitialMerge,
    memory: Memory,
    report: Report = lambda line: None,
) -> dict[str, Array]:
    """Reads the base and the task vectors, and merges by a method that needs calibration data.

    Args:
        workspace: The models and the data.
        initial: The method, with fitted interference steps.
        memory: The place of the task vectors.
        report: Shows how much is done, and the time left.

    Returns:
        The merged model's parameters by name, in the dtype of the base.
    """
    method = method_of(initial)
    deltas = load_task_vectors(workspace.models, None, method.interference, memory)[0]
    return method_parameters(workspace, method, workspace.base(), deltas, report)


def open_statistics(workspace: Workspace, report: Report = lambda line: None) -> Statistics:
    """Returns the statistics of the recipe's calibration data, all of it.

    Args:
        workspace: The models and the data.
        report: Shows how much is done, and the time left.
    """
    models = workspace.models
    # Nothing is computed again: only forward passes are run, and gradients of single examples.
    network = models.family.build_backbone(models.config, "nothing")
    backbone = models.devices.spread(network)
    head_networks = workspace.head_networks

    def run(parameters: Mapping[str, Array], inputs: Mapping[str, Array]) -> Any:
        outputs = backbone(parameters, inputs)
        if not models.family.language:
            return outputs
        head = next(iter(head_networks.values()))  # all are the same: parameters of the backbone
        return head(complete_head(head, {}, parameters), outputs)

    def logits_of(head: Network) -> Callable[..., Float[Array, "B ... C"]]:
        def logits(
            parameters: Mapping[str, Array], stored: PyTree[Array], inputs: Mapping[str, Array]
        ) -> Float[Array, "B ... C"]:
            return head(complete_head(head, stored, parameters), backbone(parameters, inputs))

        return logits

    tasks = []
    for task, examples in workspace.data.calibration.items():
        size = min(workspace.evaluator.batch_size, len(examples))
        if (mesh := models.devices.mesh) is not None:
            size += -size % mesh.size  # so that no example is repeated unseen
        tasks.append(
            TaskData(
                lambda examples=examples, size=size: _batches(examples, size, workspace),
                -(-len(examples) // size),
                logits_of(head_networks[task]),
                workspace.heads[task],
            )
        )
    return Statistics(run, tasks, _timed(report))


def _batches(examples: Examples, size: int, workspace: Workspace) -> Iterator[CalibrationBatch]:
    """Yields all examples in batches of one size; those that fill up the last one have weight 0."""
    for index, inputs in sorted_batches(examples, size):
        require_going_on()
        length = examples.padded_length(index)
        weights = (np.arange(size) < len(index)).astype(np.float32)
        full = np.resize(index, size)
        yield CalibrationBatch(
            workspace.models.devices.examples(inputs),
            weights,
            # Of classifiers none is read, and these would be taken for tokens.
            None if examples.by_class else examples.take_labels(full, length),
            examples.take_counted(full, length),
        )


def _timed(report: Report) -> Callable[[float], None]:
    """Returns the function that reports a part that is done, with the time left."""
    start = time.monotonic()

    def on_batch(done: float) -> None:
        left = (time.monotonic() - start) * (1 - done) / done
        report(f"{100 * done:.0f}%, {_in_words(left)} left")

    return on_batch


def _in_words(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
