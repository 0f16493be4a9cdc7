"""Fits the tasks' heads to the features of a merged model."""

import dataclasses
import logging
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.safetensors_file import read_header
from adamerge_jax.data.batches import Calibration
from adamerge_jax.errors import InputError
from adamerge_jax.heads.fitted import Kind, fit_head
from adamerge_jax.models.family import LastLayer
from adamerge_jax.pipeline.export import ZERO_SHOT_FILE
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
        checkpoint: The merge. For a task without a head of its own in it nothing is read.

    Returns:
        The parameters of the last layers by task and name.

    Raises:
        InputError: A task's model has another head than its expert.
    """
    family = workspace.models.family
    last, is_zero_shot = family.last_layer, family.auto_class is None
    heads: dict[str, dict[str, Array]] = {}
    if last is None:
        return heads
    for task, head in workspace.heads.items():
        prefix = f"{task}." if is_zero_shot else ""
        model = _model_with_head(checkpoint, task, is_zero_shot=is_zero_shot)
        if model is None:
            continue
        heads[task] = {}
        for name in (last.weight, last.bias):
            tensor = model.tensors.get(prefix + name)
            if tensor is None or tensor.shape != head[name].shape:
                raise InputError(
                    f"{model.source}: {prefix}{name} is not the head of expert {task!r}, whose "
                    f"shape is {head[name].shape}; evaluate it with the recipe that it was merged "
                    "with"
                )
            heads[task][name] = jnp.asarray(model.read(prefix + name))
    return heads


def _model_with_head(checkpoint: Checkpoint, task: str, *, is_zero_shot: bool) -> Checkpoint | None:
    """Opens the part of an exported merge that has a task's head; None where there is none."""
    if is_zero_shot:
        file = checkpoint.folder / ZERO_SHOT_FILE
        if not file.is_file():
            return None
        source = f"{checkpoint.source}/{ZERO_SHOT_FILE}"
        return dataclasses.replace(checkpoint, source=source, tensors=read_header(file))
    folder = checkpoint.folder / "tasks" / task
    if not folder.is_dir():
        return None
    return Checkpoint.in_folder(f"{checkpoint.source}/tasks/{task}", folder)


def _identity(head: Mapping[str, Array], last: LastLayer) -> dict[str, Array]:
    """Returns a head that has features in place of logits."""
    features = head[last.weight].shape[1]
    return {**head, last.weight: jnp.eye(features), last.bias: jnp.zeros(features)}
