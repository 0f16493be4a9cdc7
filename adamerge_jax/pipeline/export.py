"""Writing a merge: the Hugging Face checkpoint, a model for every task, the Orbax checkpoint.

Where all experts are LoRA adapters the merge may be one too, written beside them for PEFT. What
mergekit can merge in the same way is written for it as a YAML file.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from rich.console import Console

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.huggingface_export import model_class, write_checkpoint
from adamerge_jax.checkpoints.matching import MatchedCheckpoint
from adamerge_jax.checkpoints.mergekit_export import inexpressible, write_merge
from adamerge_jax.checkpoints.orbax import UnreadArray, save_parameters
from adamerge_jax.checkpoints.peft import MatchedAdapter
from adamerge_jax.checkpoints.peft_export import AdapterWeights, save_adapter
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.coefficients.granularities import ALONG_AXES, unprepared
from adamerge_jax.data.tokenizers import tokenizer_owner
from adamerge_jax.devices import is_first_process, wait_for_all
from adamerge_jax.errors import InputError
from adamerge_jax.pipeline.models import Models, match_backbone
from adamerge_jax.pipeline.provenance import hub_datasets, model_origins
from adamerge_jax.pipeline.read import DTYPES, fold, load_backbone, load_head, read_parameter
from adamerge_jax.recipes.schema import Recipe
from adamerge_jax.report.model_card import model_card
from adamerge_jax.runs.results import Row

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CHECKPOINT_FOLDER = "checkpoint"
ORBAX_FOLDER = "orbax"
ADAPTER_FOLDER = "adapter"
EXPORTS = (CHECKPOINT_FOLDER, ORBAX_FOLDER, ADAPTER_FOLDER)

_TASK_TYPES = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    # PEFT's for a model without a head; images have none.
    "AutoModelForSequenceClassification": "FEATURE_EXTRACTION",
}
"""What PEFT calls a task, by the class that loads its model."""


def export(
    recipe: Recipe,
    models: Models,
    coefficients: Coefficients,
    out: Path,
    *,
    root: Path,
    rows: list[Row],
    console: Console,
) -> None:
    """Writes the merged model as a Hugging Face checkpoint, and in what other forms are asked for.

    Where there are several processes all must call this; only the first one writes, but for the
    Orbax checkpoint, of which each writes its own part, so that all must have one file system.

    Args:
        recipe: Says in which dtype, in files of which size, and in which other forms.
        models: The base and its experts.
        coefficients: How much of each expert goes where.
        out: The folder that gets `checkpoint/`, and `orbax/` and `adapter/` where asked for.
        root: Folder that relative paths of the recipe start from.
        rows: Results for the model card.
        console: Where progress is printed.

    Raises:
        InputError: It cannot be an adapter, or what is read or written cannot be.
    """
    if recipe.export.adapter:
        require_adapters(models, coefficients.granularity, coefficients.interference)
    first = is_first_process()
    with console.status("writing the checkpoint"):
        if first:
            _export_checkpoint(recipe, models, coefficients, out, root, rows)
        wait_for_all("checkpoint written")
    if recipe.export.orbax:
        with console.status("writing the Orbax checkpoint"):
            merged = Checkpoint.open(out / CHECKPOINT_FOLDER)
            matched = match_backbone(models, merged, "merged checkpoint")
            parameters = _orbax_parameters(models, matched, _dtype(recipe))
            save_parameters(out / ORBAX_FOLDER, parameters)
    if recipe.export.adapter and first:
        with console.status("writing the adapter"):
            export_adapter(recipe, models, coefficients, out / ADAPTER_FOLDER)


def _export_checkpoint(
    recipe: Recipe,
    models: Models,
    coefficients: Coefficients,
    out: Path,
    root: Path,
    rows: list[Row],
) -> None:
    """Writes the merged model and that of every task as `save_pretrained` would."""
    dtype = _dtype(recipe)

    def cast(array: np.ndarray) -> np.ndarray:
        is_weight = jnp.issubdtype(array.dtype, jnp.floating)
        return array if dtype is None or not is_weight else array.astype(dtype)

    config = copy.deepcopy(models.config)
    # A head of the base's own would stand beside each task's head under the same name.
    replaced = {name for task in models.experts for name in models.head_names(task)}
    carried = [name for name in models.base.extra if name not in replaced]
    if len(carried) < len(models.base.extra):
        config.architectures = [model_class(config)]
    opened = write_checkpoint(
        out / CHECKPOINT_FOLDER,
        max_shard_bytes=recipe.export.shard_megabytes * 10**6,
        expected_bytes=checkpoint_bytes(models, recipe),
    )
    tasks = [
        task
        for task in models.experts
        if models.head_names(task) and task not in coefficients.left_out
    ]
    with opened as writer:
        for name, array in fold(models, coefficients, dtype):
            writer.add(name, cast(array))
        for name in carried:
            writer.add(models.prefix + name, cast(models.base.checkpoint.read(name)))
        writer.write_config(config)
        owner = tokenizer_owner(models.by_name, recipe.tokenizer) or models.base
        # In the order in which the run looks for them.
        every = [model.checkpoint for model in (owner, models.base, *models.experts.values())]
        writer.copy_assets(owner.checkpoint, every)
        card = model_card(
            coefficients,
            rows,
            origins=model_origins(models, root),
            datasets=hub_datasets(recipe, root),
            auto_class=models.family.auto_class,
            task_folders=tasks,
        )
        writer.write_text("README.md", card)
        for task in tasks:
            expert = models.experts[task]
            whole = isinstance(expert, MatchedCheckpoint)
            writer.add_task_model(
                task,
                config=expert.checkpoint.config if whole else _task_config(models, expert),
                head={name: cast(array) for name, array in load_head(models, task).items()},
                assets=expert.checkpoint if whole else models.base.checkpoint,
                otherwise=every,
            )


def _orbax_parameters(
    models: Models, merged: MatchedCheckpoint, dtype: np.dtype | None
) -> dict[str, Array] | dict[str, UnreadArray]:
    """The merged backbone: several processes have a part each, a single one reads in its turn."""
    if jax.process_count() > 1:
        return load_backbone(models, merged, dtype)
    return {
        name: UnreadArray(
            shape,
            dtype or models.base.dtype(models.tensors(name)[0]),
            partial(read_parameter, models, merged, name, dtype),
        )
        for name, shape in models.shapes.items()
    }


def _dtype(recipe: Recipe) -> np.dtype | None:
    """That of what is written; None for each tensor's in the base."""
    return DTYPES[recipe.export.dtype] if recipe.export.dtype else None


def require_adapters(models: Models, granularity: str, interference: Sequence[object]) -> None:
    """Refuses a merge that is no sum of low-rank factors, so that no adapter says what it is.

    Args:
        models: The base and its experts.
        granularity: Of the coefficients, by its name in a recipe.
        interference: What is done to the task vectors.

    Raises:
        InputError: Says why.
    """

    def refuse(why: str) -> InputError:
        return InputError(f"export.adapter: {why}; leave it out, the checkpoint is written anyway")

    # Along one axis at most, a scale goes into one of the two factors.
    if granularity not in ALONG_AXES:
        raise refuse(
            f"coefficients of granularity {granularity!r} make the merge more than a sum of the "
            f"experts' factors; that needs one of {', '.join(ALONG_AXES)}"
        )
    if interference:
        raise refuse("interference steps change entries, and factors have none")
    for task, expert in models.experts.items():
        if isinstance(expert, MatchedCheckpoint):
            raise refuse(f"expert {task!r} is a whole model; only adapters merge to an adapter")
        for name in models.family.tied(models.config):
            if expert.has_factors(name) and name not in models.kept:
                raise refuse(
                    f"expert {task!r} changes {name}, the embeddings and the output layer in one, "
                    "which PEFT does not merge right; keep_from_base leaves it unmerged"
                )
        for name in expert.saved:
            if name not in models.base.names or name in models.kept:
                continue
            if (expert.read(name) != models.base.read(name)).any():
                raise refuse(
                    f"expert {task!r} saved {name} whole rather than as factors "
                    "(modules_to_save, or a bias); keep_from_base leaves it unmerged"
                )


def export_adapter(recipe: Recipe, models: Models, coefficients: Coefficients, out: Path) -> None:
    """Writes the merge as one LoRA adapter of the base: `b = [s_1 B_1 | s_2 B_2 ...]`, `a` below.

    The factors are float32, their rank is the sum of the experts'. A language model is loaded as
    PEFT does it, with `AutoPeftModelForCausalLM.from_pretrained(out)` for example. The adapter of a
    classifier is that of its backbone and brings no head, as each task has its own: it is for the
    base as `AutoModel` loads it (`AutoPeftModelForFeatureExtraction`, or
    `PeftModel.from_pretrained` on any base in memory), and its task type is `FEATURE_EXTRACTION`
    for texts and none for images.

    Args:
        recipe: Says which revision the base is.
        models: The base and its experts, for whom `require_adapters` found nothing to refuse.
        coefficients: How much of each expert goes where.
        out: The folder to make.

    Raises:
        InputError: A factor has NaN or infinite values, or the folder cannot be written.
    """
    scales = coefficients.scales()
    # AutoModel's own names lack what a class with a head puts in front of its backbone's.
    headed = models.family.auto_class is not None and not models.family.language
    prefix = models.family.prefixes[0] if headed else ""
    modules = {}
    for name in coefficients.parameters:
        if name in models.kept:
            continue
        a, b, embedding = [], [], False
        for expert, scale in zip(models.experts.values(), np.asarray(scales[name]), strict=True):
            factors = expert.low_rank(name)
            if factors is None:
                continue
            by_column = scale.shape[1] > 1
            a.append(factors.right * scale if by_column else factors.right)
            b.append(factors.left if by_column else factors.left * scale)
            embedding = factors.embedding
        if not a:
            continue  # only experts that are left out changed it
        module = name.removesuffix(".weight").removeprefix(prefix)
        for of_checkpoint, of_model in models.family.renamed:
            module = module.replace(of_checkpoint, of_model)
        modules[module] = AdapterWeights(np.concatenate(a), np.concatenate(b, axis=1), embedding)
    source = models.base.checkpoint.source
    save_adapter(
        out,
        modules,
        base=str(Path(source).resolve()) if Path(source).is_dir() else source,
        task_type=_TASK_TYPES.get(models.family.auto_class),
        revision=recipe.base.revision,
    )


def export_mergekit(recipe: Recipe, models: Models, coefficients: Coefficients, file: Path) -> None:
    """Writes the YAML file with which mergekit makes the same merge of the same models.

    Args:
        recipe: Says in which dtype the merge is.
        models: The base and its experts.
        coefficients: How much of each expert goes where.
        file: The file to make.

    Raises:
        InputError: Says why mergekit cannot make it, or why the file cannot be written.
    """
    if coefficients.interference:
        raise inexpressible("it has interference steps, whose order and sums are other ones there")
    scales, experts = coefficients.scales(), len(models.experts)
    granularity = coefficients.make_granularity(coefficients.shapes)
    finer = any(scale.size != experts for scale in scales.values())
    if finer or granularity.prepare is not unprepared:
        raise inexpressible(
            f"coefficients of granularity {coefficients.granularity!r} are finer than tensors, "
            "and its weights are not"
        )
    write_merge(
        file,
        models.base,
        models.experts,
        {
            name: np.asarray(scale).reshape(experts)
            for name, scale in scales.items()
            if name not in models.kept
        },
        revisions={source.name: source.revision for source in models.sources},
        dtype=recipe.export.dtype,
    )


def _task_config(models: Models, adapter: MatchedAdapter) -> PretrainedConfig:
    """The config of the model that an adapter makes of the base, with the class that loads it."""
    config = copy.deepcopy(adapter.checkpoint.config)
    config.architectures = [model_class(config, models.family.auto_class)]
    return config


def export_bytes(models: Models, recipe: Recipe) -> int:
    """Size on disk of all that `export` writes, but for what is small: heads and an adapter."""
    return checkpoint_bytes(models, recipe) * (2 if recipe.export.orbax else 1)


def checkpoint_bytes(models: Models, recipe: Recipe) -> int:
    """Size of the merged weights in one checkpoint."""
    total = 0
    for tensor in models.base.checkpoint.tensors.values():
        dtype = _dtype(recipe) or tensor.dtype
        total += int(np.prod(tensor.shape)) * dtype.itemsize
    return total
