"""Builds the method that a recipe describes: functions in place of names.

`build` is called once a run. Later stages get the `Method`, the models and the data, and nothing of
the recipe.
"""

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import optax

from adamerge_jax.checkpoints.dtypes import DELTA_DTYPES
from adamerge_jax.coefficients.granularities import Granularity, Shapes, make_granularity
from adamerge_jax.coefficients.importance import FROM_COARSE
from adamerge_jax.data.copies import copies_within
from adamerge_jax.errors import InputError
from adamerge_jax.heads.fitted import Kind as FitKind
from adamerge_jax.heads.learned import HeadLearning
from adamerge_jax.interference import FittedStep, make_step
from adamerge_jax.learning.held_out import Control
from adamerge_jax.learning.optimizer import build_optimizer, require_gradient_alone
from adamerge_jax.methods import make_method
from adamerge_jax.models.family import Family, HeadForm
from adamerge_jax.models.problem import NUMBERS, Problem
from adamerge_jax.objectives import (
    Objective,
    TargetSpec,
    logit_alignment,
    make_objective,
    weighted_sum,
)
from adamerge_jax.objectives.regularizers import Regularizer, make_regularizer
from adamerge_jax.recipes.embedders import (
    OF_EMBEDDINGS,
    objectives_of_embedder,
)
from adamerge_jax.recipes.problems import (
    distinct_terms,
    objectives_by_task,
    require_no_predictions,
    specs_by_problem,
)
from adamerge_jax.recipes.schema import (
    CoefficientsRecipe,
    HeadKind,
    InterferenceRecipe,
    LearningRecipe,
    MethodRecipe,
    ObjectiveRecipe,
    Recipe,
    RegularizerRecipe,
    RetainRecipe,
    TaskRecipe,
)
from adamerge_jax.task_vectors.offload.memory import Place

if TYPE_CHECKING:
    from transformers import PretrainedConfig


RETAINED_TOKENS = 64
"""The base's likeliest tokens that are learned from where objectives look at none, or at all."""


class OpenedModels(Protocol):
    """The facts of opened models that a method depends on.

    Attributes:
        family: The architecture family of all of them.
    """

    family: Family

    @property
    def problems(self) -> Mapping[str, Problem]:
        """The problem that the head of each expert solves, by task."""
        ...

    @property
    def only_adapters(self) -> bool:
        """True where every expert is an adapter."""
        ...

    def head_form(self, task: str) -> HeadForm:
        """Returns the form of a task's head."""
        ...

    @property
    def config(self) -> "PretrainedConfig":
        """The base's config."""
        ...


class GranularityChoice(NamedTuple):
    """A granularity by name, before the shapes of the merged parameters are known."""

    name: str
    options: Mapping[str, Any]

    def make(self, shapes: Shapes) -> Granularity:
        """Makes the granularity for parameters of these shapes.

        Raises:
            InputError: It refuses a shape.
        """
        return make_granularity(self.name, self.options, shapes)

    def along_axes(self, shapes: Shapes) -> bool:
        """Returns True if each scale broadcasts against its parameter.

        Args:
            shapes: The shapes of the parameters that are merged.
        """
        return self.name not in FROM_COARSE and self.make(shapes).along_axes(shapes)

    def keeps_factors(self, shapes: Shapes) -> bool:
        """Returns True if a merge of low-rank task vectors stays low-rank.

        Args:
            shapes: The shapes of the parameters with low-rank task vectors.
        """
        return self.name not in FROM_COARSE and self.make(shapes).keeps_factors(shapes)


class Stage(NamedTuple):
    """A run of the learning loop.

    Attributes:
        name: `coarse`, or `learning` for the one whose coefficients are the result.
        granularity: The granularity of the coefficients.
        steps: The number of optimizer steps.
        evaluate_every: The number of steps between two evaluations of the held-out data.
        optimizer: The optax transformation for this number of steps.
    """

    name: str
    granularity: GranularityChoice
    steps: int
    evaluate_every: int
    optimizer: optax.GradientTransformation


class HeadChoice(NamedTuple):
    """The heads of a merge.

    Attributes:
        kind: kept, scaled, refitted or learned; see `HeadsRecipe`.
        learning: The learning of heads beside the coefficients; None unless they are learned.
        fitted: False for heads that are not known to be linear layers, and cannot be fitted.
        note: A sentence on heads that are kept though the preset says otherwise, if there is one.
    """

    kind: HeadKind
    learning: HeadLearning | None = None
    fitted: bool = True
    note: str | None = None

    @property
    def fit(self) -> FitKind | None:
        """The fit of heads after learning, and of baselines; None where there is none."""
        if self.kind == "kept" or not self.fitted:
            return None
        return "scaled" if self.kind == "scaled" else "refitted"


class Method(NamedTuple):
    """The method of learning coefficients, as functions and numbers.

    Attributes:
        stages: The runs of the learning loop, in their order: coarse coefficients first, if any.
        constraint: The name of the constraint on coefficients.
        initial: The value at which every coefficient starts.
        chooses_initial: True if that value is to be replaced by the one with the lowest objective.
        initial_merge: The merge without learning to which task vectors are added, if any.
        start: The file whose coefficients learning starts from, if any.
        other_base: True if that file may have been learned for another base.
        objectives: The objective of each task.
        objective_in_words: The objectives in words.
        target_specs: The targets that each task's objective wants.
        regularizers: The terms that are added to the sum over tasks, with their weights.
        interference: The steps that change task vectors before mixing.
        control: The tasks that must not suffer if another is to be forgotten, else None.
        batch_size: The number of examples of every task per step.
        microbatches: The number of parts in which a step runs its batch.
        mixes_once: True if the parts of a batch share one mix of the weights.
        copies: The number of changed copies of each calibration example, at most.
        held_out: The part of each task's calibration examples that is held out.
        seed: The seed of all randomness.
        delta_dtype: The dtype of task vectors; None for the checkpoint's.
        memory: The place of task vectors.
        heads: The heads of the merge.
        retained: The objective on general text, where there is some; None for classifiers.
    """

    stages: tuple[Stage, ...]
    constraint: str
    initial: float
    chooses_initial: bool
    initial_merge: MethodRecipe | None
    start: str | None
    other_base: bool
    objectives: Mapping[str, Objective]
    objective_in_words: str
    target_specs: Mapping[str, TargetSpec]
    regularizers: Sequence[tuple[float, Regularizer]]
    interference: tuple[FittedStep, ...]
    control: Control | None
    batch_size: int
    microbatches: int
    mixes_once: bool
    copies: int
    held_out: float
    seed: int
    delta_dtype: np.dtype | None
    memory: Place
    heads: HeadChoice = HeadChoice("kept")
    retained: Objective | None = None

    def with_task(self, task: str, objective: Objective) -> "Method":
        """Returns the method with the objective of one more task."""
        specs = {**self.target_specs, task: objective.target_spec}
        return self._replace(objectives={**self.objectives, task: objective}, target_specs=specs)

    def copies_of(self, examples: int) -> int:
        """Returns the copies of each of a task's examples, no more than all steps draw.

        Args:
            examples: The number of the task's examples.
        """
        drawn = self.batch_size * sum(stage.steps for stage in self.stages)
        return copies_within(drawn, examples, self.copies)

    @property
    def result(self) -> Stage:
        """The stage whose coefficients are the result."""
        return self.stages[-1]


def build(recipe: Recipe, models: OpenedModels) -> Method:
    """Builds the method of a recipe.

    Args:
        recipe: A checked recipe.
        models: The base and its experts, opened.

    Raises:
        InputError: An objective does not go with this kind of model, labels are missing, or the
            optimizer needs more than a gradient.
    """
    language, embeds = models.family.language, models.family.embeds is not None
    learning, coefficients = recipe.learning, recipe.coefficients
    if embeds:
        terms = objectives_of_embedder(recipe)
        objectives = build_objectives(terms, recipe.tasks)
    elif language:
        terms = recipe.objectives
        _require_no_embeddings(terms)
        objectives = build_objectives(terms, recipe.tasks)
    else:
        _require_no_embeddings(recipe.objectives)
        by_task = objectives_by_task(recipe, models.problems)
        terms = distinct_terms(by_task.values())
        objectives = _build_by_task(by_task)
    specs = {task: objective.target_spec for task, objective in objectives.items()}
    _require_fitting(specs, recipe.tasks, models.problems, language)
    if embeds:
        _require_texts(specs, recipe)
    elif language:
        _require_no_classes(terms)
    else:
        _require_no_tokens(terms)
        if learning.control is not None and NUMBERS in models.problems.values():
            raise InputError(
                "learning.control: is of classes, and an expert gives numbers; leave it out"
            )
        specs = specs_by_problem(specs, models.problems)
    chosen = {f"evaluation.methods.{n}": m for n, m in enumerate(recipe.evaluation.methods)}
    if coefficients.initial_merge is not None:
        chosen["coefficients.initial_merge"] = coefficients.initial_merge
    for field, method in chosen.items():  # refused here rather than after learning
        made = make_method(method.name, method.options)
        require_no_predictions(field, method.name, made, models)
    if language or len(specs) == 1:
        # With one output layer for all tasks experts would contradict each other; one task has no
        # others.
        specs = {task: spec._replace(cross_task=0) for task, spec in specs.items()}
    if not language:
        specs = {task: spec._replace(prompts=False) for task, spec in specs.items()}
    if learning.control is not None and not language:
        # Control without labels needs the agreement with the experts.
        specs = {task: spec._replace(expert_logits=True) for task, spec in specs.items()}
    heads = _build_heads(recipe, models)
    if heads.fit:
        specs = {task: spec._replace(expert_logits=True) for task, spec in specs.items()}
    delta_dtype = recipe.task_vectors.dtype or recipe.dtype
    return Method(
        stages=_build_stages(coefficients, learning, recipe.seed, models),
        constraint=coefficients.constraint,
        initial=recipe.initial_coefficient,
        chooses_initial=recipe.chooses_initial,
        initial_merge=coefficients.initial_merge,
        start=coefficients.start,
        other_base=coefficients.other_base,
        objectives=objectives,
        objective_in_words=" + ".join(map(_in_words, terms)),
        target_specs=specs,
        regularizers=build_regularizers(recipe.regularizers),
        interference=build_interference(recipe.interference, recipe.seed),
        control=_build_control(list(recipe.tasks), recipe.forgotten, learning.control),
        batch_size=learning.batch_size,
        microbatches=learning.microbatches,
        # Split among devices, the merged model would be gathered as a whole.
        mixes_once=learning.microbatches > 1
        and learning.mix == "step"
        and recipe.devices.model == 1,
        copies=0 if language else learning.copies,
        held_out=learning.held_out,
        seed=recipe.seed,
        delta_dtype=DELTA_DTYPES[delta_dtype] if delta_dtype else None,
        memory=recipe.task_vectors.memory,
        heads=heads,
        retained=_build_retained(recipe.retain, specs.values()) if language else None,
    )


def _build_heads(recipe: Recipe, models: OpenedModels) -> HeadChoice:
    """Builds the choice of heads; that of a preset is left out where it does not fit.

    Raises:
        InputError: The recipe itself chooses heads that these models do not have.
    """
    choice = recipe.heads
    if choice.kind == "kept":
        return HeadChoice("kept")
    names_kind = choice != recipe.heads_of_preset
    layers = {task: models.head_form(task).last_layer for task in recipe.tasks}
    present = [last for last in layers.values() if last is not None]
    unfit = [task for task, last in layers.items() if last is None]
    without_layer = f"no layer of the head of {unfit[0]!r} has an output a class" if unfit else ""
    if unfit or recipe.forgotten:
        if names_kind:
            reason = without_layer or "a task is to be forgotten"
            if models.family.language:
                reason = "language models have none of their own"
            if models.family.embeds is not None:
                reason = "sentence embedders have none"
            raise InputError(f"heads: are to be {choice.kind}, but {reason}; leave heads out")
        has_heads = not models.family.language and models.family.embeds is None
        note = f"all heads are kept: {without_layer}" if unfit and has_heads else None
        return HeadChoice("kept", note=note)
    if any(last.scaled_only for last in present) and choice.kind != "scaled":
        if names_kind:
            raise InputError(
                f"heads: are to be {choice.kind}, but those of zero-shot models are given by the "
                "names of classes; choose scaled or kept"
            )
        return HeadChoice("scaled")
    if choice.kind != "learned":
        return HeadChoice(choice.kind)
    schedule = optax.cosine_decay_schedule(choice.learning_rate, recipe.learning.steps)
    names = tuple(dict.fromkeys(name for last in present for name in last.names))
    return HeadChoice("learned", HeadLearning(names, optax.adam(schedule), choice.ridge))


def build_objectives(
    terms: Sequence[ObjectiveRecipe], tasks: Iterable[str]
) -> dict[str, Objective]:
    """Builds the objective of each task; tasks with equal weights share one, compiled once.

    Raises:
        InputError: There is no such objective, or it refuses an option.
    """
    parts = [make_objective(term.name, term.options) for term in terms]

    @functools.cache
    def of_weights(weights: tuple[float, ...]) -> Objective:
        pairs = zip(weights, parts, strict=True)
        return weighted_sum([(weight, part) for weight, part in pairs if weight])

    return {task: of_weights(tuple(term.weight_of(task) for term in terms)) for task in tasks}


def _build_by_task(terms: Mapping[str, Sequence[ObjectiveRecipe]]) -> dict[str, Objective]:
    """Builds the objective of each task from terms of its own."""
    objectives: dict[str, Objective] = {}
    for task, of_task in terms.items():
        if task not in objectives:
            equal = [other for other, of_other in terms.items() if of_other == of_task]
            objectives |= build_objectives(of_task, equal)
    return {task: objectives[task] for task in terms}


def _build_retained(source: RetainRecipe | None, specs: Iterable[TargetSpec]) -> Objective | None:
    """Builds the divergence from the base, over as many likely tokens as objectives look at."""
    if source is None or not source.weight:
        return None
    asked = functools.reduce(operator.or_, specs, TargetSpec())
    top_tokens = asked.top_tokens or RETAINED_TOKENS
    return weighted_sum([(source.weight, logit_alignment(form="kl", top_tokens=top_tokens))])


def build_regularizers(terms: Sequence[RegularizerRecipe]) -> list[tuple[float, Regularizer]]:
    """Builds the terms that are added to the objectives, with their weights.

    Raises:
        InputError: There is no such regularizer, or it refuses an option.
    """
    return [(term.weight, make_regularizer(term.name, term.options)) for term in terms]


def build_interference(steps: Sequence[InterferenceRecipe], seed: int) -> tuple[FittedStep, ...]:
    """Builds the steps that change task vectors before mixing.

    Raises:
        InputError: There is no such step, or it refuses an option.
    """
    built = []
    for step in steps:
        drawn = {"seed": seed} if step.name == "drop_and_rescale" else {}
        built.append(FittedStep(step.name, drawn | step.options))
        make_step(step.name, built[-1].options)
    return tuple(built)


def _build_stages(
    coefficients: CoefficientsRecipe, learning: LearningRecipe, seed: int, models: OpenedModels
) -> tuple[Stage, ...]:
    name, options = coefficients.granularity, coefficients.granularity_options
    if name == "auto":
        # A language model's answers say enough for both; two sums of whole experts take memory.
        by_both = models.family.language and models.only_adapters
        name = "row_column" if by_both else "row"
    if name == "partition":
        options = {"seed": seed} | options
    if name == "head" and not options:
        options = {"heads": models.family.heads(models.config)}
    lengths = [("learning", GranularityChoice(name, options), learning.steps)]
    if coefficients.coarse is not None:
        choice = GranularityChoice(coefficients.coarse.granularity, {})
        lengths.insert(0, ("coarse", choice, coefficients.coarse.steps))
    optimizer = learning.optimizer
    if optimizer.name == "concrete":
        optimizer = optimizer.model_copy(update={"options": {"seed": seed} | optimizer.options})
    stages = tuple(
        Stage(
            name,
            choice,
            steps,
            learning.evaluate_every or max(1, steps // 10),
            build_optimizer(optimizer, steps),
        )
        for name, choice, steps in lengths
    )
    require_gradient_alone(stages[-1].optimizer, learning.optimizer.name)
    return stages


def _build_control(
    tasks: Sequence[str], forgotten: Sequence[str], fraction: float | None
) -> Control | None:
    if not forgotten:
        return None
    controlled = tuple(k for k, task in enumerate(tasks) if task not in forgotten)
    return Control(controlled, fraction)


def _require_fitting(
    specs: Mapping[str, TargetSpec],
    tasks: Mapping[str, TaskRecipe],
    problems: Mapping[str, Problem],
    language: bool,
) -> None:
    """Refuses objectives that do not go with this kind of model, and labels that are missing."""
    for task, spec in specs.items():
        if language:
            if spec.augmented:
                raise InputError(
                    "objectives: pseudo_labels is for classes; a language model has none"
                )
        elif spec.labels and ((source := tasks[task].calibration) is None or source.label is None):
            raise InputError(
                f"tasks.{task}.calibration.label: is missing, and an objective needs labels; "
                f"name the column of {problems[task].label}, or choose an objective that needs none"
            )


def _require_texts(specs: Mapping[str, TargetSpec], recipe: Recipe) -> None:
    """Refuses single texts where pairs are needed, pairs where single texts are, and control."""
    for task, spec in specs.items():
        source = recipe.tasks[task].calibration
        if source is None:
            continue
        are_pairs = not isinstance(source.text, str)
        if spec.pairs and not are_pairs:
            raise InputError(
                f"tasks.{task}.calibration.text: is one column, and contrastive learns from pairs "
                "of texts that belong together; give the columns of both, or take "
                "embedding_alignment"
            )
        if spec.hidden_states and are_pairs:
            raise InputError(
                f"tasks.{task}.calibration.text: is two columns, and hidden_state_alignment reads "
                "one text an example; give one column, or take embedding_alignment"
            )
    if recipe.learning.control is not None:
        raise InputError(
            "learning.control: is of classes, and sentence embedders have none; leave it out"
        )


def _require_no_embeddings(terms: Sequence[ObjectiveRecipe]) -> None:
    """Refuses objectives that only sentence embedders have."""
    for position, term in enumerate(terms):
        if term.name in OF_EMBEDDINGS:
            raise InputError(
                f"objectives.{position}: {term.name} is for sentence embedders, whose folders have "
                "a modules.json of sentence-transformers; these experts have none: take "
                "logit_alignment"
            )


def _require_no_classes(terms: Sequence[ObjectiveRecipe]) -> None:
    """Refuses objectives that only classifiers have."""
    for position, term in enumerate(terms):
        if term.name == "expert_labels":
            raise InputError(
                f"objectives.{position}: expert_labels is for classes, and these models predict "
                "tokens; take logit_alignment"
            )


def _require_no_tokens(terms: Sequence[ObjectiveRecipe]) -> None:
    """Refuses options that only a language model's objectives have."""
    for position, term in enumerate(terms):
        if "top_tokens" in term.options:
            raise InputError(
                f"objectives.{position}.options.top_tokens: is for language models, and these "
                "predict classes; leave it out"
            )


def _in_words(term: ObjectiveRecipe) -> str:
    if isinstance(term.weight, dict):
        return f"{term.name} ({', '.join(f'{task} {w:g}' for task, w in term.weight.items())})"
    return term.name if term.weight == 1 else f"{term.weight:g} {term.name}"
