"""The models, heads and data of a recipe, opened and checked against each other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from adamerge_jax.checkpoints.dtypes import DTYPES
from adamerge_jax.data.class_names import align_labels, names_of_outputs
from adamerge_jax.data.examples import Examples, Subset, tell_cut
from adamerge_jax.devices import ONE_DEVICE, Devices
from adamerge_jax.errors import InputError
from adamerge_jax.evaluation.answering import Answering
from adamerge_jax.evaluation.embedding_scores import embedding_metric, require_pairs
from adamerge_jax.evaluation.evaluator import Evaluator, examples_at_once
from adamerge_jax.evaluation.generate import Writer
from adamerge_jax.evaluation.problem_scores import Scorer, scorer_of
from adamerge_jax.evaluation.retention import RETAINED, General
from adamerge_jax.learning.forward import Forward, forward_with_heads
from adamerge_jax.mixing import Mixture
from adamerge_jax.models.family import Family, Network
from adamerge_jax.models.problem import CHOICES, LABELS, NUMBERS, WORDS
from adamerge_jax.objectives import NOT_PREDICTED, TargetSpec
from adamerge_jax.pipeline.base_answers import BaseWriter
from adamerge_jax.pipeline.end_of_text import ExpertsEnds
from adamerge_jax.pipeline.example_loader import ExampleLoader, example_loader
from adamerge_jax.pipeline.general import find_general, load_general
from adamerge_jax.pipeline.models import Models, open_models
from adamerge_jax.pipeline.read import load_backbone, load_expert, load_head, load_zero_shot_head
from adamerge_jax.recipes.schema import Recipe, TaskRecipe
from adamerge_jax.runs.counting import ShowCount, count_silently
from adamerge_jax.runs.rows import common_metric

if TYPE_CHECKING:
    pass


class Data(NamedTuple):
    """The examples by task; validation and test are empty unless every task has them."""

    calibration: dict[str, Examples]
    validation: dict[str, Examples]
    test: dict[str, Examples]


class Workspace(NamedTuple):
    """The models and the data of a recipe.

    Attributes:
        models: The base and its experts, opened; their weights are read by `base` and `expert`.
        data: The examples by task.
        dtype: The dtype of weights and activations; None for the checkpoint's.
        backbone: The merged part of the model, as a function of its parameters.
        heads: The parameters of the head of each task that is learned, and of the base where
            general text is among these.
        head_networks: Each of these heads as a function of its parameters.
        evaluator: The evaluator, which runs models of this architecture on examples.
        root: Folder that relative paths of the recipe start from.
        general: General text, on which the merge is to stay as the base is; None for none.
        asked_ends: The experts' median probability of the end of text by task, where they were
            asked.
    """

    models: Models
    data: Data
    dtype: np.dtype | None
    backbone: Network
    heads: dict[str, dict[str, Array]]
    head_networks: dict[str, Network]
    evaluator: Evaluator
    root: Path
    asked_ends: Mapping[str, float] = {}
    general: General | None = None

    def base(self) -> dict[str, Array]:
        """Reads the parameters of the base."""
        return load_backbone(self.models, self.models.base, self.dtype)

    def expert(self, task: str, base: Mapping[str, Array]) -> dict[str, Array | Mixture]:
        """Reads the parameters of a task's expert, without its head.

        Args:
            task: The task of the expert.
            base: The base's parameters, which an adapter shares.
        """
        return load_expert(self.models, task, base, self.dtype)

    def forward(self, specs: Iterable[TargetSpec]) -> Forward:
        """Returns the function that runs the merged model with the head of each task.

        Args:
            specs: What the tasks' objectives ask for.
        """
        return forward_for(specs, self.models.family, self.backbone, self.head_networks)


def forward_for(
    specs: Iterable[TargetSpec], family: Family, backbone: Network, heads: Mapping[str, Network]
) -> Forward:
    """Returns the function that runs a merged model of a family with the head of each task.

    Args:
        specs: What the tasks' objectives ask for.
        family: The architecture family.
        backbone: The merged part of the model, as a function of its parameters.
        heads: Each task's head as a function of its parameters.
    """
    specs = list(specs)
    return forward_with_heads(
        backbone,
        list(heads.values()),
        sorted({layer for spec in specs for layer in spec.hidden_states}),
        cross_task=any(spec.cross_task for spec in specs),
        logits_again=family.language,
        embeds=family.embeds is not None,
    )


def open_workspace(
    recipe: Recipe,
    root: Path,
    devices: Devices = ONE_DEVICE,
    show_count: ShowCount = count_silently,
    check: Callable[[Models], object] = lambda models: None,
) -> Workspace:
    """Opens and checks all that a recipe names.

    Args:
        recipe: The recipe that names models and data.
        root: Folder that relative paths start from.
        devices: The devices that hold the weights and run the models.
        show_count: Shows how many answers a language model has written, now and in evaluations.
        check: Refuses opened models before any data is read.

    Raises:
        InputError: Something cannot be read, or models and data do not belong together.
    """
    recipe.require_calibration()
    models = dataclasses.replace(open_models(recipe, root), devices=devices)
    check(models)
    load = example_loader(
        models,
        root,
        tokenizer=recipe.tokenizer,
        max_length=recipe.max_length,
        seed=recipe.seed,
        image_size=recipe.image_size,
    )
    dtype = DTYPES[recipe.dtype] if recipe.dtype else None
    backbone = models.family.build_backbone(models.config, recipe.learning.rematerialize)
    spread = devices.spread(backbone)
    networks = {task: models.build_head(task) for task in models.experts}
    if models.family.language:
        networks[RETAINED] = models.family.build_head(models.config)
    ends = ExpertsEnds(models, spread, networks, dtype, recipe.learning.batch_size)
    data = _load_data(recipe.tasks, load, ends.predicts_end, models)
    embeds = models.family.embeds
    if embeds is None:
        _align_labels(recipe.tasks, models, data)
    if recipe.learning.examples is not None:
        calibration = {
            task: Subset.draw(examples, recipe.learning.examples, recipe.seed)
            for task, examples in data.calibration.items()
        }
        data = data._replace(calibration=calibration)
    for part in Data._fields:
        for task, examples in getattr(data, part).items():
            tell_cut(examples, f"{part} data of task {task!r}")
    heads = _load_heads(recipe.tasks, models, data, dtype)
    _require_labels_in_range(models, heads, data)
    scorers = {} if embeds or models.family.language else _scorers(recipe.tasks, models, data)
    metric = common_metric(s.metrics[0] for s in scorers.values()) if scorers else "loss"
    if embeds is not None:
        scored = data.test or data.validation or data.calibration
        metric = embedding_metric(next(iter(scored.values())))
    settings, answering = recipe.evaluation, None
    if models.family.writes:
        start = load.decoder_start
        writer = Writer(models.family, models.config, settings.batch_size, start)
        answering = Answering(writer, settings.exact_match, settings.max_new_tokens, show_count)
    if models.family.language:
        heads[RETAINED] = {}  # all of it is the backbone's
    is_cpu = jax.default_backend() == "cpu"
    at_once = examples_at_once(settings.batch_size, is_cpu=is_cpu)
    evaluator = Evaluator(spread, networks, heads, at_once, metric, answering, embeds, scorers)
    read_base = functools.cache(partial(load_backbone, models, models.base, dtype))
    found = find_general(
        recipe.retain,
        recipe.learning,
        load,
        is_chat=any(examples.are_conversations for examples in data.calibration.values()),
        seed=recipe.seed,
    )
    base_writer = None
    if answering is not None:
        base_writer = BaseWriter(answering.writer, models, dtype, read_base, show_count)
    general = found and load_general(found, base_writer)
    if general is not None and data.test:
        evaluator.watch(general, read_base())
    if general is None or general.learning is None:
        networks, heads = ({t: by[t] for t in recipe.tasks} for by in (networks, heads))
    return Workspace(
        models, data, dtype, backbone, heads, networks, evaluator, root, ends.probabilities, general
    )


def require_classifiers(workspace: Workspace) -> None:
    """Refuses models that have no accuracy.

    Raises:
        InputError: The models are language models.
    """
    if workspace.models.family.language:
        raise InputError("accuracies are compared, and a language model has none")


def _load_data(
    tasks: Mapping[str, TaskRecipe],
    load_source: ExampleLoader,
    predicts_end: Callable[[str, Examples], bool],
    models: Models,
) -> Data:
    family = models.family

    def load(part: str) -> dict[str, Examples]:
        sources = {task: task_recipe.source(part) for task, task_recipe in tasks.items()}
        given = [task for task, source in sources.items() if source is not None]
        missing = [task for task in sources if task not in given]
        if given and missing:
            raise InputError(
                f"tasks.{missing[0]}.{part}: is missing while {given[0]} has {part} data; "
                "give it for every task or for none"
            )
        return {
            task: load_source(
                source,
                f"{part} data of task {task!r}",
                models.problems[task],
                models.experts[task].checkpoint.config.num_labels,
                partial(predicts_end, task),
            )
            for task, source in sources.items()
            if source is not None
        }

    data = Data(*map(load, Data._fields))
    for part in ("validation", "test"):
        if family.embeds is not None:
            require_pairs(getattr(data, part), part)
            continue
        for task, examples in getattr(data, part).items():
            field, problem = f"tasks.{task}.{part}.label", models.problems[task]
            if examples.labels is None and not family.language:
                raise InputError(f"{field}: is missing; name the column of {problem.label}")
            if problem == WORDS and (examples.labels == NOT_PREDICTED).all():
                raise InputError(f"{field}: no word has a class; give other data")
            if problem == LABELS and not examples.labels.any():
                raise InputError(f"{field}: no example has a label; give other data")
            if problem == NUMBERS and (np.ptp(examples.labels, axis=0) == 0).any():
                raise InputError(
                    f"{field}: all numbers are the same, with which nothing correlates; give "
                    "other data"
                )
    return data


def _load_heads(
    tasks: Mapping[str, TaskRecipe], models: Models, data: Data, dtype: np.dtype | None
) -> dict[str, dict[str, Array]]:
    heads = {}
    for task, task_recipe in tasks.items():
        if models.family.auto_class is not None:
            head = load_head(models, task)
        else:
            names = _class_names(task, task_recipe, data)
            head = load_zero_shot_head(models, names, task_recipe.templates)
        parameters = {name: jnp.asarray(array, dtype) for name, array in head.items()}
        heads[task] = models.devices.replicate(parameters)
    return heads


def _align_labels(tasks: Mapping[str, TaskRecipe], models: Models, data: Data) -> None:
    """Gives all data of a task the labels of its expert's outputs, by the names of classes."""
    for task, task_recipe in tasks.items():
        parts = {part: getattr(data, part).get(task) for part in Data._fields}
        named = {
            part: examples
            for part, examples in parts.items()
            if examples is not None and examples.class_names is not None
        }
        config = models.experts[task].checkpoint.config
        outputs_of = f"the config.json of expert {task!r}"
        if task_recipe.class_names is not None:
            outputs, outputs_of = task_recipe.class_names, f"tasks.{task}.class_names"
            if models.family.auto_class is not None and len(outputs) != config.num_labels:
                raise InputError(
                    f"{outputs_of}: has {len(outputs)} names, the expert has "
                    f"{config.num_labels} outputs; give one for each, in their order"
                )
        elif models.family.auto_class is None:
            outputs, outputs_of = _class_names(task, task_recipe, data), "the task's other data"
        else:
            outputs = names_of_outputs(config.id2label)
        for part, examples in named.items():
            name = f"{part} data of task {task!r}"
            align_labels(examples, outputs, name, outputs_of=outputs_of)


def _require_labels_in_range(
    models: Models, heads: Mapping[str, Mapping[str, Array]], data: Data
) -> None:
    """Refuses labelled data with a class that the task's head does not have."""
    for part in Data._fields:
        for task, examples in getattr(data, part).items():
            if examples.labels is None or models.problems[task] in (NUMBERS, CHOICES):
                continue
            if models.family.auto_class is None:
                classes = len(heads[task]["text_embeddings"])
            else:
                classes = models.experts[task].checkpoint.config.num_labels
            if examples.by_class:
                if examples.labels.shape[1] != classes:
                    raise InputError(
                        f"{part} data of task {task!r}: has {examples.labels.shape[1]} classes, "
                        f"the task's head has {classes}; give class_names in the order of the "
                        "model's outputs, or check that data and expert belong together"
                    )
            elif examples.labels.max() >= classes:
                place = tuple(np.argwhere(examples.labels >= classes)[0])
                raise InputError(
                    f"{part} data of task {task!r}: example {place[0]} has label "
                    f"{examples.labels[place]}, the task's head has classes 0 to {classes - 1}; "
                    "check that data and expert belong together"
                )


def _scorers(tasks: Mapping[str, TaskRecipe], models: Models, data: Data) -> dict[str, Scorer]:
    """Returns the scores of each task, those of words by the names of their classes."""
    scorers = {}
    for task, problem in models.problems.items():
        scored = [part[task] for part in (data.test, data.validation) if task in part]
        names = next((examples.class_names for examples in scored if examples.class_names), None)
        names = names or tasks[task].class_names
        names = names or names_of_outputs(models.experts[task].checkpoint.config.id2label)
        scorers[task] = scorer_of(problem, names, scored)
    return scorers


def _class_names(task: str, recipe: TaskRecipe, data: Data) -> list[str]:
    if recipe.class_names is not None:
        return recipe.class_names
    for part in (data.test, data.calibration):
        if task in part and part[task].class_names is not None:
            return part[task].class_names
    raise InputError(
        f"tasks.{task}.class_names: is missing, and the data set does not name its classes"
    )
