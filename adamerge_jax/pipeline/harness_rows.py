"""The scores by lm-evaluation-harness of a merge, and of the base and the experts beside it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from adamerge_jax.checkpoints.any_model import AnyModel
from adamerge_jax.checkpoints.config_file import classes_of
from adamerge_jax.checkpoints.gguf_model import GgufCheckpoint
from adamerge_jax.checkpoints.peft import Expert, MatchedAdapter
from adamerge_jax.checkpoints.tokenizer_files import has_tokenizer, load_tokenizer
from adamerge_jax.data.tokenizers import tokenizer_owner
from adamerge_jax.errors import InputError
from adamerge_jax.evaluation.harness import FIELD, Harness, HarnessModel, LoadedTasks
from adamerge_jax.evaluation.harness_cache import HarnessCache
from adamerge_jax.pipeline.models import Models
from adamerge_jax.recipes.schema import LmEvalRecipe, Recipe
from adamerge_jax.runs.counting import Tally, count_on
from adamerge_jax.runs.harness import HarnessResults, HarnessRow, HarnessTask, ModelKind

MERGE = "merge"
"""The name of the merge's row."""


class _Model(NamedTuple):
    """A model of the table."""

    name: str
    kind: ModelKind
    source: HarnessModel


def open_harness(
    settings: LmEvalRecipe | None, recipe: Recipe, models: Models, root: Path, console: Console
) -> Harness | None:
    """Looks up the tasks that a recipe asks for; None if it asks for none.

    Args:
        settings: The section of the recipe that asks for them.
        recipe: The recipe.
        models: Its base and experts.
        root: Folder that relative paths of the recipe start from.
        console: The console that shows that tasks are looked up.

    Raises:
        InputError: There is no such task, the models are no language models, or one of them cannot
            be evaluated as it is.
    """
    if settings is None:
        return None
    _require_language(models)
    owner = tokenizer_owner(models.by_name, recipe.tokenizer)
    if owner is None:
        raise InputError(f"{FIELD}: no model brings a tokenizer; put the base's beside its weights")
    if settings.chat_template and not load_tokenizer(owner.checkpoint, owner.role).chat_template:
        raise InputError(
            f"{FIELD}.chat_template: the tokenizer of {owner.role} ({owner.checkpoint.source}) has "
            "no chat template; choose another one (tokenizer), or leave it out"
        )
    if settings.models == "all":
        for model in models.by_name.values():
            if isinstance(model.checkpoint, GgufCheckpoint):
                raise InputError(
                    f"{FIELD}: {model.role} ({model.checkpoint.source}) is a GGUF file, which "
                    "lm-eval does not read here; evaluate the merge alone (models: merge)"
                )
    with console.status("looking up the tasks of lm-eval"):
        return Harness(settings, root)


def _require_language(models: Models) -> None:
    """Refuses models that neither continue nor answer a text."""
    from transformers.models.auto import modeling_auto

    known = {
        name
        for mapping in (
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        )
        for name in mapping.values()
    }
    runs_text = models.family.language or isinstance(models.family, AnyModel)
    for expert in models.experts.values():
        classes = classes_of(expert.checkpoint.config_fields)
        if not runs_text or (classes and not known & set(classes)):
            raise InputError(
                f"{FIELD}: lm-eval evaluates language models, and {expert.role} "
                f"({expert.checkpoint.source}) is none (but {', '.join(classes) or 'unknown'}); "
                "leave lm_eval out"
            )


def harness_results(
    harness: Harness,
    models: Models,
    checkpoint: Path,
    console: Console,
    name: str = MERGE,
) -> HarnessResults:
    """Evaluates the merge and, where they are asked for, the base and each expert.

    Each model's scores on a task are kept when they are there: an evaluation that was interrupted,
    and another run with the same base and experts, evaluate only what is missing.

    Args:
        harness: The tasks.
        models: The base and the experts.
        checkpoint: The folder of the merged checkpoint.
        console: The console that shows how many requests were answered, and the time left.
        name: The name of the merge's row.

    Raises:
        InputError: A task cannot be loaded, or fails, or a model cannot be loaded.
    """
    evaluated = _models(harness, models, checkpoint, name)
    with console.status("loading the tasks of lm-eval"):
        loaded = [harness.load(task) for task in harness.settings.tasks]
        cache = HarnessCache(harness.facts)
        scores = {
            (model.name, tasks.name): cache.find(model.source, tasks)
            for model in evaluated
            for tasks in loaded
        }
    missing = sum(
        tasks.requests
        for model in evaluated
        for tasks in loaded
        if scores[model.name, tasks.name] is None
    )
    tally = Tally()
    with ExitStack() as stack:
        if missing:
            stack.enter_context(tally.shown(count_on(console), "lm-eval: requests", missing))
        for model in evaluated:
            to_do = [tasks for tasks in loaded if scores[model.name, tasks.name] is None]
            for tasks, measured in _evaluate(harness, model, to_do, tally):
                cache.keep(model.source, tasks, measured)
                scores[model.name, tasks.name] = measured
    settings = harness.settings
    return HarnessResults(
        version=version("lm_eval"),
        limit=settings.limit,
        chat_template=settings.chat_template,
        rows=[
            HarnessRow(
                model=model.name,
                kind=model.kind,
                tasks=_distinct([scores[model.name, tasks.name] or [] for tasks in loaded]),
            )
            for model in evaluated
        ],
    )


def _models(harness: Harness, models: Models, checkpoint: Path, name: str) -> list[_Model]:
    """Returns the models to evaluate, the merge last."""
    chat = checkpoint if harness.settings.chat_template else None
    merge = _Model(name, "merge", HarnessModel(checkpoint, checkpoint, chat_tokenizer=chat))
    if harness.settings.models == "merge":
        return [merge]
    others = [
        _Model(other, "base" if other == "base" else "expert", _source(model, models, checkpoint))
        for other, model in models.by_name.items()
    ]
    return [
        *(m._replace(source=m.source._replace(chat_tokenizer=chat)) for m in others),
        merge,
    ]


def _source(model: Expert, models: Models, checkpoint: Path) -> HarnessModel:
    """Returns a base's or an expert's files; without a tokenizer of its own it has the merge's."""
    base = models.base.checkpoint
    is_adapter = isinstance(model, MatchedAdapter)
    owners = [model.checkpoint, *([base] if is_adapter else [])]
    tokenizers = (owner.folder for owner in owners if has_tokenizer(owner))
    return HarnessModel(
        base.folder if is_adapter else model.checkpoint.folder,
        next(tokenizers, checkpoint),
        adapter=model.checkpoint.folder if is_adapter else None,
    )


def _evaluate(
    harness: Harness, model: _Model, to_do: Sequence[LoadedTasks], tally: Tally
) -> Iterator[tuple[LoadedTasks, list[HarnessTask]]]:
    """Yields the scores of a model on tasks, each when it is there; the model is loaded once."""
    if not to_do:
        return
    opened = harness.open_model(model.source, lambda: tally.add(1))
    for tasks in to_do:
        yield tasks, harness.evaluate(opened, tasks)


def _distinct(parts: Sequence[Sequence[HarnessTask]]) -> list[HarnessTask]:
    """Joins scores on several names; a task that is part of two groups counts once."""
    by_name: dict[str, HarnessTask] = {}
    for task in (task for part in parts for task in part):
        if task.name not in by_name or task.shown:
            by_name[task.name] = task
    return list(by_name.values())
