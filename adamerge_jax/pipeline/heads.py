"""Fits the tasks' heads to the features of a merged model."""

import logging
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.data.batches import Calibration
from adamerge_jax.errors import InputError
from adamerge_jax.heads.fitted import Kind, fit_head
from adamerge_jax.models.family import LastLayer
from adamerge_jax.pipeline.workspace import Workspace

log = logging.getLogger(__name__)

HeadParameters = Mapping[str, Mapping[str, Float[Array, "..."]]]
"""The parameters of heads by task and name."""


def fit_heads(
    workspace: Workspace,
    parameters: Mapping[str, Array],
    calibration: Calibration,
    kind: Kind,
    seed: int,
) -> dict[str, dict[str, np.ndarray]]:
    """Fits the last layer of each task's head to its expert's logits.

    Args:
        workspace: The models, heads and data.
        parameters: The merged model's parameters by name.
        calibration: The calibration data, with the experts' logits as targets.
        kind: What is fitted.
        seed: The recipe's seed.

    Returns:
        The fitted parameters by task and name, float32.
    """
    last = workspace.models.family.last_layer
    assert last is not None
    evaluator = workspace.evaluator.with_heads(
        {task: _identity(head, last) for task, head in workspace.heads.items()}
    )
    heads = {}
    for task, examples in calibration.examples.items():
        fit = fit_head(
            # With an identity for its weight, the last layer returns its inputs.
            evaluator.logits(parameters, task, examples),
            calibration.targets[task].expert_logits,
            np.asarray(workspace.heads[task][last.weight]),
            np.asarray(workspace.heads[task][last.bias]),
            kind=kind,
            seed=seed,
        )
        heads[task] = {
            last.weight: fit.weight.astype(np.float32),
            last.bias: fit.bias.astype(np.float32),
        }
        log.debug(f"task {task!r}: head {kind}, strength {fit.strength:g}, KL {fit.kl:.4f}")
    return heads


def read_heads(workspace: Workspace, checkpoint: Checkpoint) -> dict[str, dict[str, Array]]:
    """Reads the heads that an exported merge has for the tasks, beside its backbone.

    Args:
        workspace: The tasks and their experts' heads.
        checkpoint: The merge. For a task without a model of its own in it nothing is read.

    Returns:
        The parameters of the last layers by task and name.

    Raises:
        InputError: A task's model has another head than its expert.
    """
    last = workspace.models.family.last_layer
    heads: dict[str, dict[str, Array]] = {}
    for task, head in workspace.heads.items():
        folder = checkpoint.folder / "tasks" / task
        if last is None or workspace.models.family.auto_class is None or not folder.is_dir():
            continue
        model = Checkpoint.in_folder(f"{checkpoint.source}/tasks/{task}", folder)
        heads[task] = {}
        for name in (last.weight, last.bias):
            if name not in model.tensors or model.tensors[name].shape != head[name].shape:
                raise InputError(
                    f"{model.source}: {name} is not the head of expert {task!r}, whose shape is "
                    f"{head[name].shape}; evaluate it with the recipe that it was merged with"
                )
            heads[task][name] = jnp.asarray(model.read(name))
    return heads


def _identity(head: Mapping[str, Array], last: LastLayer) -> dict[str, Array]:
    """Returns a head that has features in place of logits."""
    features = head[last.weight].shape[1]
    return {**head, last.weight: jnp.eye(features), last.bias: jnp.zeros(features)}
