"""Writing a merge: the Hugging Face checkpoint, a model for every task, the Orbax checkpoint."""

import copy
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from adamerge_jax import report
from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.huggingface_export import CheckpointWriter
from adamerge_jax.checkpoints.matching import MatchedCheckpoint
from adamerge_jax.checkpoints.orbax import save_parameters
from adamerge_jax.checkpoints.peft import MatchedAdapter
from adamerge_jax.coefficients import Coefficients
from adamerge_jax.evaluation import Row
from adamerge_jax.loading import DTYPES, Models, fold, load_head, load_trunk, match_trunk
from adamerge_jax.recipes import Recipe

CHECKPOINT_FOLDER = "checkpoint"
ORBAX_FOLDER = "orbax"


def export(
    recipe: Recipe,
    models: Models,
    coefficients: Coefficients,
    out: Path,
    *,
    rows: list[Row],
    console: Console,
) -> None:
    """Writes the merged model as a Hugging Face and as an Orbax checkpoint.

    Args:
        recipe: Says in which dtype and in files of which size.
        models: The base and its experts.
        coefficients: How much of each expert goes where.
        out: The folder that gets `checkpoint/` and `orbax/`.
        rows: Results for the model card.
        console: Where progress is printed.
    """

    def cast(array: np.ndarray) -> np.ndarray:
        is_weight = jnp.issubdtype(array.dtype, jnp.floating)
        if recipe.export.dtype is None or not is_weight:
            return array
        return array.astype(DTYPES[recipe.export.dtype])

    config = copy.deepcopy(models.config)
    # A head of the base's own would stand beside each task's head under the same name.
    replaced = {name for task in models.experts for name in models.head_names(task)}
    carried = [name for name in models.base.extra if name not in replaced]
    if len(carried) < len(models.base.extra):
        config.architectures = [MODEL_MAPPING_NAMES[config.model_type]]
    writer = CheckpointWriter(
        out / CHECKPOINT_FOLDER,
        max_shard_bytes=recipe.export.shard_megabytes * 10**6,
        expected_bytes=export_bytes(models, recipe),
    )
    with console.status("writing the checkpoint"), writer:
        for name, array in fold(models, coefficients):
            writer.add(name, cast(array))
        for name in carried:
            writer.add(models.prefix + name, cast(models.base.checkpoint.read(name)))
        writer.write_config(config)
        writer.copy_assets(models.base.checkpoint)
        writer.write_text("README.md", report.model_card(coefficients, rows))
        for task, expert in models.experts.items():
            if head := load_head(models, task):
                whole = isinstance(expert, MatchedCheckpoint)
                writer.add_task_model(
                    task,
                    config=expert.checkpoint.config if whole else _task_config(models, expert),
                    head={name: cast(array) for name, array in head.items()},
                    assets=expert.checkpoint if whole else models.base.checkpoint,
                )
    with console.status("writing the Orbax checkpoint"):
        merged = match_trunk(models, Checkpoint.open(out / CHECKPOINT_FOLDER), "merged checkpoint")
        save_parameters(out / ORBAX_FOLDER, load_trunk(models, merged, None))


def _task_config(models: Models, adapter: MatchedAdapter) -> PretrainedConfig:
    """The config of the model that an adapter makes of the base, with the class that loads it."""
    config = copy.deepcopy(adapter.checkpoint.config)
    config.architectures = [_CLASSES[models.family.auto_class][config.model_type]]
    return config


_CLASSES = {
    "AutoModelForSequenceClassification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForImageClassification": MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
"""Names of the classes of `transformers`, by auto class and model type."""


def export_bytes(models: Models, recipe: Recipe) -> int:
    """Size of the merged weights on disk."""
    total = 0
    for tensor in models.base.checkpoint.tensors.values():
        dtype = DTYPES[recipe.export.dtype] if recipe.export.dtype else tensor.dtype
        total += int(np.prod(tensor.shape)) * dtype.itemsize
    return total
