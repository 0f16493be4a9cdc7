"""The export of a merge: a Hugging Face checkpoint with a model per task, Orbax, an adapter.

Each form is an `Exporter` in `EXPORTERS`. A mergekit file is written separately.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from rich.console import Console

from adamerge_jax.checkpoints.assets import require_copyable
from adamerge_jax.checkpoints.config_export import (
    readable_by_older_versions,
    special_tokens,
    with_head,
    with_tokenizer,
    without_head,
    without_old_weights,
)
from adamerge_jax.checkpoints.config_file import Fields
from adamerge_jax.checkpoints.diffusion import Pipeline, component_of
from adamerge_jax.checkpoints.diffusion_export import copied_files, write_pipeline
from adamerge_jax.checkpoints.dtypes import DTYPES
from adamerge_jax.checkpoints.finite import narrowed
from adamerge_jax.checkpoints.folders import require_space
from adamerge_jax.checkpoints.huggingface_export import (
    headless_class,
    model_class,
    write_checkpoint,
)
from adamerge_jax.checkpoints.matching import MatchedCheckpoint
from adamerge_jax.checkpoints.mergekit_export import inexpressible, write_merge
from adamerge_jax.checkpoints.opening import open_checkpoint
from adamerge_jax.checkpoints.orbax import UnreadArray, require_plain_path, save_parameters
from adamerge_jax.checkpoints.peft import Expert, MatchedAdapter
from adamerge_jax.checkpoints.peft_export import AdapterWeights, save_adapter
from adamerge_jax.checkpoints.tokenizer_files import load_tokenizer
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.data.tokenizers import tokenizer_owner
from adamerge_jax.devices import is_first_process, wait_for_all
from adamerge_jax.errors import InputError
from adamerge_jax.files.writing import write_whole
from adamerge_jax.methods import make_method
from adamerge_jax.models.embedder import POOLER
from adamerge_jax.models.problem import MULTIPLE_CHOICE, TOKEN_CLASSIFICATION
from adamerge_jax.parameter_names import matches
from adamerge_jax.pipeline.initial_merge import merged_names
from adamerge_jax.pipeline.models import Models, match_backbone
from adamerge_jax.pipeline.read import load_backbone, load_head, read_parameter
from adamerge_jax.recipes.build import GranularityChoice, Method
from adamerge_jax.recipes.schema import ExportRecipe
from adamerge_jax.runs.counting import OnCount, count_on
from adamerge_jax.stopping import require_going_on
from adamerge_jax.task_vectors import LowRankDelta, RowColumnDelta

CHECKPOINT_FOLDER = "checkpoint"
ADAPTER_FOLDER = "adapter"
CARD_FILE = "README.md"
ZERO_SHOT_FILE = "zero_shot_heads.safetensors"

_TASK_TYPES = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    # PEFT's for a model without a head; images have none.
    "AutoModelForSequenceClassification": "FEATURE_EXTRACTION",
    MULTIPLE_CHOICE: "FEATURE_EXTRACTION",
    TOKEN_CLASSIFICATION: "FEATURE_EXTRACTION",
}
"""PEFT's task types by the class that loads the model."""


class ExportJob(NamedTuple):
    """A merge that is to be written.

    Attributes:
        models: The base and its experts.
        settings: The dtype, the size of files, and the wanted forms.
        merged: The function `dtype -> (name, tensor)` that yields the merged backbone, tensor by
            tensor in the order of the base; None for each tensor's dtype in the base.
        tasks: The tasks that get a model with their head.
        card: The function `task folders -> README.md` of the merged checkpoint.
        coefficients: The coefficients of the merge.
        tokenizer: `base` or the task whose tokenizer the merge takes; None for the first.
    """

    models: Models
    settings: ExportRecipe
    merged: Callable[[np.dtype | None], Iterator[tuple[str, np.ndarray]]]
    tasks: Sequence[str]
    card: Callable[[Sequence[str]], str]
    coefficients: Coefficients
    tokenizer: str | None = None


class MergeFacts(NamedTuple):
    """The properties of a merge that are known before it is made.

    Attributes:
        granularity: The granularity of its coefficients.
        interference: The steps that change its task vectors.
        has_initial_merge: True if task vectors are added to a merge by a method without learning.
        stored_bytes: The bytes of the tensors of such a merge that the coefficients file holds.
    """

    granularity: GranularityChoice
    interference: Sequence[object]
    has_initial_merge: bool = False
    stored_bytes: int = 0

    @classmethod
    def of(cls, coefficients: Coefficients) -> MergeFacts:
        """Returns the facts of the merge of a coefficients file."""
        is_stored = coefficients.initial_merge is not None and coefficients.initial_merge.stored
        return cls(
            GranularityChoice(coefficients.granularity, coefficients.granularity_options),
            coefficients.interference,
            coefficients.initial_merge is not None,
            stored_bytes(coefficients.shapes.values()) if is_stored else 0,
        )

    @classmethod
    def of_method(cls, method: Method, models: Models) -> MergeFacts:
        """Returns the facts of the merge that a method of learning will make of models."""
        chosen, stored = method.initial_merge, 0
        if chosen is not None and make_method(chosen.name, chosen.options).needs_data:
            stored = stored_bytes(models.base.shape(name) for name in merged_names(models))
        granularity = method.result.granularity
        return cls(granularity, method.interference, chosen is not None, stored)


class Exporter(NamedTuple):
    """A form in which a merge is written.

    Attributes:
        folder: Its folder under the run folder.
        title: Its name in messages.
        wanted: The function that returns True if the settings ask for this form.
        write: The function that writes a merge to a new folder.
        guard: The function that refuses models, a merge or a folder that do not allow this form.
        bytes: The function that returns the size on disk without small files.
        by_all: True if every process takes part in writing; else the first one alone does.
    """

    folder: str
    title: str
    wanted: Callable[[ExportRecipe], bool]
    write: Callable[[ExportJob, Path], None]
    guard: Callable[[Models, MergeFacts, Path], None] = lambda models, facts, folder: None
    bytes: Callable[[Models, ExportRecipe], int] = lambda models, settings: 0
    by_all: bool = False


def export(job: ExportJob, out: Path, console: Console, *, keep: bool = False) -> None:
    """Writes a merge in every wanted form.

    With several processes all must call this, and all must share one file system.

    Args:
        job: The merge.
        out: The folder that gets a folder for each form.
        console: The console that shows progress.
        keep: If True, a form that is there is kept: the same run has written it before it was
            interrupted.

    Raises:
        InputError: The merge cannot be an adapter, or a file cannot be read or written.
    """
    facts = MergeFacts.of(job.coefficients)
    wanted = [exporter for exporter in EXPORTERS if exporter.wanted(job.settings)]
    for exporter in wanted:
        exporter.guard(job.models, facts, out)
    if keep:
        wanted = [exporter for exporter in wanted if not (out / exporter.folder).is_dir()]
    wait_for_all("exports chosen")
    for exporter in wanted:
        require_going_on()
        words, total = f"writing the {exporter.title}: tensors", len(job.models.base.names)
        with console.status(words), count_on(console)(words, total) as on_count:
            if exporter.by_all or is_first_process():
                merged = partial(_counted, job.merged, on_count)
                exporter.write(job._replace(merged=merged), out / exporter.folder)
            wait_for_all(f"{exporter.title} written")


def _counted(
    merged: Callable[[np.dtype | None], Iterator[tuple[str, np.ndarray]]],
    on_count: OnCount,
    dtype: np.dtype | None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a merge, and counts those that have been written."""
    for done, tensor in enumerate(merged(dtype)):
        on_count(done)
        yield tensor


def write_card(job: ExportJob, out: Path) -> None:
    """Writes the model card of an exported checkpoint anew.

    Args:
        job: The merge.
        out: The folder that `export` has written to.
    """
    write_whole(out / CHECKPOINT_FOLDER / CARD_FILE, job.card(_tasks_with_heads(job)))


def require_exportable(
    models: Models, settings: ExportRecipe, facts: MergeFacts, out: Path
) -> None:
    """Refuses a merge that cannot be written in a wanted form, or a disk that is too small.

    Raises:
        InputError: The merge or the disk is refused; the message says why.
    """
    for exporter in EXPORTERS:
        if exporter.wanted(settings):
            exporter.guard(models, facts, out)
    require_space(out, export_bytes(models, settings) + facts.stored_bytes)


def stored_bytes(shapes: Iterable[tuple[int, ...]]) -> int:
    """Returns the size in bytes of tensors that a coefficients file stores, in float32."""
    return sum(4 * int(np.prod(shape)) for shape in shapes)


def export_bytes(models: Models, settings: ExportRecipe) -> int:
    """Returns the size in bytes of what `export` writes, without heads and an adapter."""
    return sum(e.bytes(models, settings) for e in EXPORTERS if e.wanted(settings))


def checkpoint_bytes(models: Models, settings: ExportRecipe) -> int:
    """Returns the size in bytes of the merged weights in one checkpoint."""
    return sum(
        int(np.prod(tensor.shape)) * (_dtype(settings) or tensor.merged_dtype).itemsize
        for tensor in models.base.checkpoint.tensors.values()
    )


def _write_checkpoint(job: ExportJob, folder: Path) -> None:
    """Writes the merged model and every task's model, in the layout of `save_pretrained`."""
    models, dtype = job.models, _dtype(job.settings)
    if isinstance(models.base.checkpoint, Pipeline):
        _write_pipeline(job, models.base.checkpoint, folder)
        return
    cast = partial(_cast, dtype=dtype)
    # A head of the base would stand beside each task's head under the same name.
    replaced = models.replaced
    embeds = models.family.embeds
    carried = [
        name
        for name in models.base.extra
        if name not in replaced and (embeds is None or matches(name, POOLER))
    ]
    loses_head = len(carried) < len(models.base.extra) or embeds is not None
    owner = tokenizer_owner(models.by_name, job.tokenizer) or models.base
    token_ids = _special_tokens(models, owner)
    tasks = _tasks_with_heads(job)
    shared = {models.prefix + name for name in carried}

    def named(name: str) -> str:
        """Returns a tensor's name without the prefix that sets it apart from those of a head."""
        prefixes = models.family.prefixes if embeds is not None else ()
        return name.removeprefix(next(filter(name.startswith, prefixes), ""))

    with write_checkpoint(
        folder,
        max_shard_bytes=job.settings.shard_megabytes * 10**6,
        expected_bytes=checkpoint_bytes(models, job.settings),
    ) as writer:
        # In the order of the base's file, whichever of its tensors the model has as parameters.
        place = {tensor: place for place, tensor in enumerate(models.base.checkpoint.tensors)}
        merged = ((place[models.base.names[n]], n, array) for n, array in job.merged(dtype))
        extra = (
            (place[name], models.prefix + name, _read_extra(models.base, name))
            for name in sorted(carried, key=place.__getitem__)
        )
        for _, name, array in heapq.merge(merged, extra, key=itemgetter(0)):
            writer.add(named(name), cast(array, name, models.base))
        writer.write_config(_merged_config(models, owner, token_ids, loses_head=loses_head))
        # In the order in which a run searches them.
        checkpoints = [model.checkpoint for model in (owner, models.base, *models.experts.values())]
        writer.copy_assets(owner.checkpoint, checkpoints)
        if token_ids:
            writer.copy_generation_settings(checkpoints[:2], token_ids)
        writer.write_text(CARD_FILE, job.card(tasks))
        if embeds is not None:
            writer.write_embedding_form(embeds, models.config.hidden_size)
        for task in tasks:
            expert = models.experts[task]
            is_whole = isinstance(expert, MatchedCheckpoint)
            writer.add_task_model(
                task,
                config=_task_config(models, task),
                head={
                    name: cast(array, name, expert)
                    for name, array in _head_of(job, task).items()
                    if name not in shared
                },
                assets=expert.checkpoint if is_whole else models.base.checkpoint,
                otherwise=checkpoints,
            )
        if models.family.auto_class is None and job.coefficients.head_tensors:
            writer.write_further_tensors(ZERO_SHOT_FILE, _zero_shot_heads(job.coefficients))


def _cast(array: np.ndarray, name: str, model: Expert, dtype: np.dtype | None) -> np.ndarray:
    """Returns a tensor in the dtype of the merge; None and whole numbers leave it as it is."""
    if dtype is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    origin = {"source": model.checkpoint.source, "role": model.role, "field": "export.dtype"}
    return narrowed(array, dtype, tensor=name, **origin)


def _read_extra(base: MatchedCheckpoint, name: str) -> np.ndarray:
    """Reads a tensor of the base that is no parameter, in the dtype that a merge has it in."""
    dtype = base.checkpoint.tensors[name].merged_dtype
    return base.checkpoint.read(name).astype(dtype, copy=False)


def _write_pipeline(job: ExportJob, pipeline: Pipeline, folder: Path) -> None:
    """Writes the merged components of a diffusion pipeline, and copies the rest of it."""
    base, dtype = job.models.base, _dtype(job.settings)

    def carry(names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        for name in names:
            yield name, _read_extra(base, name)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        """Yields merged and carried tensors, those of a component one after the other."""
        carried: dict[str, list[str]] = {name: [] for name in pipeline.components}
        for name in base.extra:
            carried[component_of(name)].append(name)
        for component, merged in groupby(job.merged(dtype), lambda item: component_of(item[0])):
            yield from merged
            yield from carry(carried.pop(component))
        for names in carried.values():
            yield from carry(names)

    write_pipeline(
        folder,
        pipeline,
        ((name, _cast(array, name, base, dtype)) for name, array in tensors()),
        max_shard_bytes=job.settings.shard_megabytes * 10**6,
        expected_bytes=checkpoint_bytes(job.models, job.settings),
        texts={CARD_FILE: job.card(())},
    )


def _head_of(job: ExportJob, task: str) -> dict[str, np.ndarray]:
    """Returns a task's head: its expert's, with what was fitted or learned in the same dtype."""
    head = load_head(job.models, task)
    expert = job.models.experts[task]
    for name, array in job.coefficients.head_tensors.get(task, {}).items():
        head[name] = narrowed(
            array,
            head[name].dtype,
            tensor=name,
            source=expert.checkpoint.source,
            role=expert.role,
            field="export.dtype",
        )
    return head


def _zero_shot_heads(coefficients: Coefficients) -> dict[str, np.ndarray]:
    """Returns the heads of zero-shot models, which no checkpoint holds, by `task.parameter`."""
    return {
        f"{task}.{name}": array
        for task, head in coefficients.head_tensors.items()
        for name, array in head.items()
    }


def _guard_checkpoint(models: Models, facts: MergeFacts, out: Path) -> None:
    if isinstance(models.base.checkpoint, Pipeline):
        list(copied_files(models.base.checkpoint))  # refuses what cannot be copied
    for model in (models.base, *models.experts.values()):
        require_copyable(model.checkpoint)


def _tasks_with_heads(job: ExportJob) -> list[str]:
    """Returns the tasks whose models are written beside the backbone."""
    return [task for task in job.tasks if job.models.head_names(task)]


def _write_orbax(job: ExportJob, folder: Path) -> None:
    """Writes the merged backbone for JAX, from the checkpoint that was written before it."""
    checkpoint = open_checkpoint(str(folder.parent / CHECKPOINT_FOLDER))
    matched = match_backbone(job.models, checkpoint, "merged checkpoint")
    save_parameters(folder, _orbax_parameters(job.models, matched, _dtype(job.settings)))


def _guard_orbax(models: Models, facts: MergeFacts, out: Path) -> None:
    require_plain_path(out)


def _orbax_parameters(
    models: Models, merged: MatchedCheckpoint, dtype: np.dtype | None
) -> dict[str, Array] | dict[str, UnreadArray]:
    """Returns the merged backbone: read in parts by several processes, lazily by a single one."""
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


def _dtype(settings: ExportRecipe) -> np.dtype | None:
    """Returns the dtype of the merged weights; None for each tensor's in the base."""
    return DTYPES[settings.dtype] if settings.dtype else None


def _guard_adapter(models: Models, facts: MergeFacts, out: Path) -> None:
    """Refuses a merge that is no sum of low-rank factors and so cannot be an adapter."""

    def refusal(reason: str) -> InputError:
        return InputError(
            f"export.adapter: {reason}; leave it out, the checkpoint is written anyway"
        )

    if models.added_tokens:
        raise refusal("the merge has tokens that the base has no rows for, nor an adapter of it")
    if facts.has_initial_merge:
        raise refusal("a merge method without coefficients gives no factors")
    factored = {
        name: models.base.shape(name)
        for name in models.base.names
        if any(expert.has_factors(name) for expert in models.experts.values())
        and name not in models.kept_from_base
    }
    if not facts.granularity.keeps_factors(factored):
        raise refusal(
            f"coefficients of granularity {facts.granularity.name!r} make the merge more than a "
            "sum of the experts' factors; that needs one of task, layer, tensor, groups, row, "
            "column, row_column, head"
        )
    if facts.interference:
        raise refusal("interference steps change entries, and factors have none")
    for task, expert in models.experts.items():
        if isinstance(expert, MatchedCheckpoint):
            raise refusal(f"expert {task!r} is a whole model; only adapters merge to an adapter")
        if rescaled := [name for name in expert.factors if not expert.has_factors(name)]:
            raise refusal(f"expert {task!r} is a DoRA, which changes {rescaled[0]} by no factors")
        for name in models.family.tied(models.config):
            if expert.has_factors(name) and name not in models.kept_from_base:
                raise refusal(
                    f"expert {task!r} changes {name}, the embeddings and the output layer in one, "
                    "which PEFT does not merge right; keep_from_base leaves it unmerged"
                )
        for name in expert.saved:
            if name not in models.base.names or name in models.kept_from_base:
                continue
            if (expert.read(name) != models.base.read(name)).any():
                raise refusal(
                    f"expert {task!r} saved {name} whole rather than as factors "
                    "(modules_to_save, or a bias); keep_from_base leaves it unmerged"
                )


def _write_adapter(job: ExportJob, folder: Path) -> None:
    """Writes the merge as one LoRA adapter of the base: `b = [s_1 B_1 | s_2 B_2 ...]`, `a` below.

    The factors are float32, their rank is the sum of the experts', twice that where there are
    coefficients for rows and columns. A language model is loaded as
    PEFT does it, with `AutoPeftModelForCausalLM.from_pretrained(folder)` for example. The adapter
    of a classifier is that of its backbone and brings no head, as each task has its own: it is for
    the base as `AutoModel` loads it (`AutoPeftModelForFeatureExtraction`, or
    `PeftModel.from_pretrained` on any base in memory), and its task type is `FEATURE_EXTRACTION`
    for texts and none for images.

    Raises:
        InputError: A factor has NaN or infinite values, or the folder cannot be written.
    """
    models, coefficients = job.models, job.coefficients
    scales, granularity = coefficients.scales(), coefficients.unstacked_granularity
    # AutoModel's names lack the prefix that a class with a head puts before its backbone's.
    has_heads = models.family.auto_class is not None and not models.family.language
    prefix = models.family.prefixes[0] if has_heads else ""
    modules = {}
    for name in coefficients.parameters:
        if name in models.kept_from_base:
            continue
        a, b, form = [], [], "linear"
        for expert, scale in zip(models.experts.values(), np.asarray(scales[name]), strict=True):
            factors = expert.low_rank(name)
            if factors is None:
                continue
            delta = granularity.prepare(name, LowRankDelta(factors.left[None], factors.right[None]))
            assert isinstance(delta, LowRankDelta | RowColumnDelta)  # it keeps factors
            left, right = map(np.asarray, delta.scaled(scale[None]))
            a.append(right)
            b.append(left)
            form = factors.form
        if not a:
            continue  # only experts that are left out changed it
        module = name.removesuffix(".weight").removeprefix(prefix)
        for name_in_checkpoint, name_in_model in models.family.renamed:
            module = module.replace(name_in_checkpoint, name_in_model)
        modules[module] = AdapterWeights(np.concatenate(a), np.concatenate(b, axis=1), form)
    source = models.base.checkpoint.source
    save_adapter(
        folder,
        modules,
        base=str(Path(source).resolve()) if Path(source).is_dir() else source,
        task_type="FEATURE_EXTRACTION"
        if models.family.embeds is not None
        else _TASK_TYPES.get(models.family.auto_class),
        revision=models.sources[0].revision,
    )


def export_mergekit(
    models: Models, coefficients: Coefficients, file: Path, dtype: str | None
) -> None:
    """Writes the YAML file with which mergekit makes the same merge of the same models.

    Args:
        models: The base and its experts.
        coefficients: The merge coefficients.
        file: The file to make.
        dtype: The name of the merge's dtype; None for the base's.

    Raises:
        InputError: mergekit cannot make the merge, or the file cannot be written.
    """
    if isinstance(models.base.checkpoint, Pipeline):
        raise inexpressible("it is a merge of diffusion pipelines")
    if models.notes:
        raise inexpressible(f"files are not read as they lie there: {models.notes[0]}")
    if coefficients.initial_merge is not None:
        raise inexpressible(
            f"it is a merge by {coefficients.initial_merge.in_words}, or adds task vectors to one"
        )
    if coefficients.interference:
        raise inexpressible("it has interference steps, whose order and sums are other ones there")
    scales, experts = coefficients.scales(), len(models.experts)
    granularity = coefficients.unstacked_granularity
    is_finer = any(scale.size != experts for scale in scales.values())
    if is_finer or granularity.prepares:
        raise inexpressible(
            f"coefficients of granularity {coefficients.granularity!r} are finer than tensors, "
            "and its weights are not; `adamerge coarsen` finds those of tensors that come nearest"
        )
    write_merge(
        file,
        models.base,
        models.experts,
        {
            name: np.asarray(scale).reshape(experts)
            for name, scale in scales.items()
            if name not in models.kept_from_base
        },
        revisions={source.name: source.revision for source in models.sources},
        dtype=dtype,
    )


def _special_tokens(models: Models, owner: Expert) -> Fields:
    """Returns the ids of the special tokens that the merge takes from its tokenizer's owner.

    There are none where the base is the owner, nor in a classifier: its positions are counted from
    the padding's id, and it generates nothing.
    """
    if owner is models.base or not models.family.language:
        return {}
    checkpoint = owner.checkpoint
    tokenizer = load_tokenizer(checkpoint, owner.role)
    return special_tokens(checkpoint.config_fields, checkpoint.config, tokenizer)


def _merged_config(
    models: Models, owner: Expert, token_ids: Mapping[str, Any], *, loses_head: bool
) -> Fields:
    """Returns the fields of the merged model's config.json: those of the base's, where changed.

    Args:
        models: The base and its experts.
        owner: The model whose tokenizer the merge takes.
        token_ids: The ids of special tokens that it takes with the tokenizer.
        loses_head: True if the merge has not the head that the base has.
    """
    in_file = models.base.checkpoint.config_fields
    fields = with_tokenizer(without_old_weights(in_file), owner.checkpoint.config_fields, token_ids)
    auto_class = models.family.auto_class if models.family.language else None
    if loses_head:
        fields = without_head(fields, headless_class(models.config))
    # The class that the base names is in a Python file, or is that of a language model without its
    # output layer, with which the merge is written.
    elif "auto_map" in in_file or (models.family.language and models.prefix):
        fields |= {"architectures": [model_class(models.config, auto_class)]}
    return readable_by_older_versions(fields)


def _task_config(models: Models, task: str) -> Fields:
    """Returns the fields of the config.json of a task's model.

    They are those of a whole expert's own file, which describes its head. An adapter's are the
    base's, with the classes of the adapter and the class that loads them.
    """
    expert, auto_class = models.experts[task], models.auto_class(task)
    config, in_file = expert.checkpoint.config, expert.checkpoint.config_fields
    fields = without_old_weights(in_file)
    if isinstance(expert, MatchedAdapter):
        class_names = [config.id2label[index] for index in sorted(config.id2label)]
        fields = with_head(fields, model_class(config, auto_class), class_names)
        if config.problem_type is not None:
            fields["problem_type"] = config.problem_type
    elif "auto_map" in in_file:
        fields |= {"architectures": [model_class(config, auto_class)]}
    return readable_by_older_versions(fields)


EXPORTERS = (
    Exporter(
        CHECKPOINT_FOLDER,
        "checkpoint",
        lambda settings: True,
        _write_checkpoint,
        _guard_checkpoint,
        checkpoint_bytes,
    ),
    Exporter(
        "orbax",
        "Orbax checkpoint",
        lambda settings: settings.orbax,
        _write_orbax,
        _guard_orbax,
        checkpoint_bytes,
        by_all=True,
    ),
    Exporter(
        ADAPTER_FOLDER, "adapter", lambda settings: settings.adapter, _write_adapter, _guard_adapter
    ),
)
"""The forms in which a merge is written, in their order."""

EXPORT_FOLDERS = tuple(exporter.folder for exporter in EXPORTERS)
