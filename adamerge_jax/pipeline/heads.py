"""Fits the tasks' heads to the features of a merged model."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.safetensors_file import read_header
from adamerge_jax.data.batches import Calibration
from adamerge_jax.data.expert_targets import StoredTargets
from adamerge_jax.errors import InputError
from adamerge_jax.evaluation.problem_scores import Batches
from adamerge_jax.heads.fitted import Kind, fit_head
from adamerge_jax.heads.losses import OF_CLASSES, OF_LABELS, of_choices, of_numbers
from adamerge_jax.models.family import LastLayer
from adamerge_jax.models.problem import CHOICES, LABELS, NUMBERS
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
    layers = {task: workspace.models.head_form(task).last_layer for task in workspace.heads}
    evaluator = workspace.evaluator.with_heads(
        {task: _identity(head, layers[task]) for task, head in workspace.heads.items()}
    )
    heads = {}
    for task, examples in calibration.examples.items():
        last = layers[task]
        # With an identity for its weight, the last layer returns its inputs.
        rows = _rows(evaluator.batches(parameters, task, examples), calibration.targets[task], seed)
        loss = OF_CLASSES
        problem = workspace.models.problems[task]
        if problem == LABELS:
            loss, rows = OF_LABELS, rows.of_labels()
        elif problem == CHOICES:
            loss, rows = of_choices(rows.features.shape[1]), rows.of_choices()
        elif problem == NUMBERS:
            loss = of_numbers(rows.expert_logits)
        fit = fit_head(
            rows.features,
            rows.expert_logits,
            np.asarray(workspace.heads[task][last.weight]),
            None if last.bias is None else np.asarray(workspace.heads[task][last.bias]),
            kind=kind,
            seed=seed,
            groups=rows.groups,
            loss=loss,
        )
        fitted = (fit.weight, fit.bias)
        heads[task] = {
            name: array.astype(np.float32) for name, array in zip(last.names, fitted, strict=False)
        }
        log.debug(f"task {task!r}: head {kind}, strength {fit.strength:g}, loss {fit.kl:.4f}")
    return heads


MOST_TO_FIT = 2000
"""Examples of a task with their changed copies, at most, that heads are fitted to, of
the merge and of baselines. With one copy of 400 images in place of four a merge has 0.5% less."""

MOST_WORDS = 20_000
"""The largest number of words of a task that a head is fitted to; of more, so many are drawn."""


class _Rows(NamedTuple):
    """The inputs of a head and the expert's outputs, a row for each example or word."""

    features: Float[np.ndarray, "N H"]
    expert_logits: Float[np.ndarray, "N C"]
    groups: Int[np.ndarray, " N"] | None

    def of_labels(self) -> "_Rows":
        """Returns the rows of a head whose outputs are each the choice between 0 and a logit."""
        return _Rows(self.features[..., 1], self.expert_logits[..., 1], self.groups)

    def of_choices(self) -> "_Rows":
        """Returns a row for each choice; those of an example are a group."""
        examples, choices, features = self.features.shape
        return _Rows(
            self.features.reshape(-1, features),
            self.expert_logits.reshape(-1, 1),
            np.repeat(np.arange(examples), choices),
        )


def _rows(batches: Batches, targets: StoredTargets, seed: int) -> _Rows:
    """Returns the rows that a head is fitted to; of texts in words those of the words."""
    order, features, expert_logits, groups = [], [], [], []
    for index, of_batch in batches:
        if targets.expert_logits is not None:
            order.append(index)
            features.append(of_batch)
            continue
        wanted = targets.take(index, of_batch.shape[1])
        counted = np.asarray(wanted.counted)
        features.append(of_batch[counted])
        expert_logits.append(np.asarray(wanted.expert_logits)[counted])
        groups.append(np.repeat(index, counted.sum(1)))
    if order:
        in_order = np.argsort(np.concatenate(order))
        return _Rows(np.concatenate(features)[in_order], targets.expert_logits, None)
    words = _Rows(*map(np.concatenate, (features, expert_logits, groups)))
    if len(words.features) <= MOST_WORDS:
        return words
    drawn = np.random.default_rng([seed, 7]).permutation(len(words.features))[:MOST_WORDS]
    return _Rows(*(array[drawn] for array in words))


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
    models = workspace.models
    is_zero_shot = models.family.auto_class is None
    heads: dict[str, dict[str, Array]] = {}
    for task, head in workspace.heads.items():
        last = models.head_form(task).last_layer if task in models.experts else None
        if last is None:
            continue
        prefix = f"{task}." if is_zero_shot else ""
        model = _model_with_head(checkpoint, task, is_zero_shot=is_zero_shot)
        if model is None:
            continue
        heads[task] = {}
        for name in last.names:
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
    parts = (jnp.eye(features), jnp.zeros(features))
    return {**head, **dict(zip(last.names, parts, strict=False))}
