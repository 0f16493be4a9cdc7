"""Learns how much of each expert goes where, for models in memory and any `forward`."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from rich.console import Console

from adamerge_jax.coefficients.granularities import Shapes
from adamerge_jax.data.arrays import ArrayExamples
from adamerge_jax.data.batches import calibrate
from adamerge_jax.data.expert_targets import StoredTargets, ask_expert
from adamerge_jax.errors import InputError
from adamerge_jax.heads.learned import HeadLearning
from adamerge_jax.interference import FittedStep, fit_steps
from adamerge_jax.learning.loop import Progress
from adamerge_jax.objectives import TargetSpec
from adamerge_jax.own_model.data import (
    Data,
    make_examples,
    name_experts,
    require_labels_in_range,
)
from adamerge_jax.own_model.folding import fold_leaves, heads_of, sources_of
from adamerge_jax.own_model.leaves import (
    Leaves,
    Model,
    places,
    require_alike,
    require_finite,
    take_apart,
)
from adamerge_jax.own_model.merged import Merged
from adamerge_jax.own_model.options import make_recipe
from adamerge_jax.own_model.progress import OnStep, show_line
from adamerge_jax.own_model.results import (
    measure_results,
    predictions_in_memory,
    require_classes,
)
from adamerge_jax.own_model.workspace import OwnModels, OwnWorkspace
from adamerge_jax.parameter_names import is_stacked, matches
from adamerge_jax.pipeline.learn import LearningInputs, learn_coefficients, require_any_merged
from adamerge_jax.pipeline.warm_start import open_warm_start
from adamerge_jax.recipes.build import HeadChoice, Method, build, build_objectives
from adamerge_jax.recipes.presets import DEFAULT_PRESET
from adamerge_jax.recipes.schema import HeadsRecipe, Recipe
from adamerge_jax.runs.folder import StepRecord
from adamerge_jax.runs.invocation import describe_start
from adamerge_jax.runs.progress import as_record
from adamerge_jax.runs.record import (
    describe_data,
    describe_machine,
    describe_tensors,
    similarity,
)
from adamerge_jax.task_vectors import DenseDelta, task_vectors

Choice = str | Mapping[str, Any]
"""A choice of a recipe: its name, or a mapping with `name` and `options`."""


def merge(
    base: Model,
    experts: Mapping[str, Any] | Sequence[Any],
    forward: Callable[[Model, Any], Any],
    data: Data,
    *,
    preset: str = DEFAULT_PRESET,
    granularity: str | None = None,
    granularity_options: Mapping[str, Any] | None = None,
    constraint: str | None = None,
    initial: float | Literal["auto"] | None = None,
    start: Path | str | None = None,
    objectives: Choice | Sequence[Choice] | None = None,
    regularizers: Choice | Sequence[Choice] | None = None,
    interference: Choice | Sequence[Choice] | None = None,
    heads: Literal["kept", "learned"] | None = None,
    head_parameters: Sequence[str] = (),
    keep_from_base: Sequence[str] | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    held_out: float | None = None,
    learning_rate: float | None = None,
    optimizer: str | None = None,
    seed: int = 0,
    recipe: Mapping[str, Any] | None = None,
    test: Data | None = None,
    progress: bool = True,
) -> Merged[Model]:
    """Learns how much of each expert goes where, and merges by that.

    Models may be pytrees of any kind: a dictionary, the variables of Flax Linen, a module or a
    state of Flax NNX, a module of Equinox. Floating-point arrays are merged; functions, whole
    numbers and random keys stay the base's. A leaf's dotted path is its name.

    What is not given is the recommended preset's, as far as it goes with any model. One
    coefficient for each expert and output unit: the last axis of each matrix (`column`), or the
    first where matrices are called `weight` (`row`). All start from the single number with the
    lowest objective, and 200 steps of Adam (0.05, decaying by a cosine) bring the merge's logits
    to those of the expert on its task's examples. The held-out tenth of these chooses the step.

    Args:
        base: The model that the experts were fine-tuned from, a pytree of arrays `[*shape]`.
        experts: K models like the base, in a list or by name; names are those of tasks.
        forward: `(model, inputs) -> logits`, `[B, C]`, or `[B, T, V]` for tokens, or `TaskOutputs`
            with them. It is compiled; the model is like the base.
        data: Examples of each expert's task, by name or in the order of the experts: an array
            `[N, ...]`, arrays by name, or a tuple of these and labels `[N]`. No objective but
            `cross_entropy` needs labels.
        preset: The recipe's preset, which fills in what is not given.
        granularity: The parameters that share a coefficient, by name in `GRANULARITIES`.
        granularity_options: Arguments of the granularity.
        constraint: The values that coefficients may take, by name in `CONSTRAINTS`.
        initial: The value at which every coefficient starts, or `auto`.
        start: A coefficients file to start from.
        objectives: The functions that are minimised, by name in `OBJECTIVES`; one with options is
            `{"name": ..., "options": {...}}`.
        regularizers: The penalties on coefficients, likewise.
        interference: The steps that change task vectors before mixing, likewise.
        heads: `kept` for the experts' own heads, `learned` for heads that are learned beside the
            coefficients; by default learned where there are `head_parameters`.
        head_parameters: Name patterns of the parameters that each task keeps for itself, such as
            `out.*`; their shapes may differ from the base's.
        keep_from_base: Name patterns of parameters that stay the base's, such as `batch_stats.*`.
        steps: The number of steps of the optimizer.
        batch_size: Examples of every task in a step.
        held_out: The part of the examples that chooses the step.
        learning_rate: The step size.
        optimizer: An optimizer of optax by name.
        seed: The seed of all randomness: the same models, data and seed give the same merge.
        recipe: Further fields of a recipe, of its sections `coefficients`, `learning`, ...
        test: Labelled examples of each task, as `data` has them, for a table of accuracies: of the
            base, the experts, merges without learning and the merge.
        progress: False for no progress line in terminals and notebooks.

    Returns:
        The merge, its coefficients and how they were learned.

    Raises:
        InputError: A model, an example or a choice cannot be used; says which, and what to do.
        NonFiniteObjectiveError: Learning diverged.

    Examples:
        A classifier `x @ kernel` with three inputs and two classes, and an expert for each class:

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> import adamerge_jax as am
        >>> base = {"kernel": jnp.ones((3, 2))}
        >>> experts = {f"class_{c}": {"kernel": base["kernel"].at[:, c].add(1.0)} for c in (0, 1)}
        >>> def forward(parameters, inputs):
        ...     return inputs @ parameters["kernel"]
        >>> data = {name: np.eye(3, dtype=np.float32).repeat(8, 0) for name in experts}
        >>> merged = am.merge(base, experts, forward, data, steps=4, progress=False)
        >>> merged.coefficients.values["kernel"].shape  # [K, columns]
        (2, 2)
        >>> merged.parameters["kernel"].shape
        (3, 2)
    """
    started = describe_start()
    experts, of_tasks = name_experts(experts, data)
    examples = make_examples(of_tasks)
    tested = {} if test is None else make_examples(name_experts(experts, test, "test")[1], "test")
    require_classes(tested)
    ours = take_apart(base, "base")
    theirs = {name: take_apart(expert, f"expert {name!r}") for name, expert in experts.items()}
    keywords = {
        "granularity": granularity,
        "granularity_options": granularity_options,
        "constraint": constraint,
        "initial": initial,
        "start": None if start is None else str(start),
        "objectives": objectives,
        "regularizers": regularizers,
        "interference": interference,
        "heads": heads,
        "keep_from_base": keep_from_base,
        "steps": steps,
        "batch_size": batch_size,
        "held_out": held_out,
        "learning_rate": learning_rate,
        "optimizer": optimizer,
    }
    parsed = make_recipe(ours, examples, bool(tested), preset, seed, recipe or {}, keywords)
    own_heads = _names_of_heads(ours, head_parameters)
    for expert in theirs.values():
        require_alike(ours, expert, own_heads)
        require_finite(expert)
    require_finite(ours)
    seconds: dict[str, float] = {}
    with _measured("task vectors and the experts' answers", seconds):
        inputs = _prepare(parsed, ours, theirs, examples, forward, own_heads, heads is not None)
        for task, of_task in tested.items():
            _try_forward(inputs.workspace, task, of_task, TargetSpec(), "test")
    stages: list[list[StepRecord]] = []
    console = Console(quiet=not progress)

    @contextmanager
    def show_stage(summary: str, of_stage: int) -> Iterator[OnStep]:
        records: list[StepRecord] = []
        stages.append(records)
        with show_line(of_stage, console) as show:

            def on_step(taken: Progress) -> None:
                records.append(as_record(list(examples), taken))
                show(taken)

            yield on_step

    with _measured("learning", seconds):
        result = learn_coefficients(inputs, show_stage=show_stage)
    merged = fold_leaves(ours, theirs, result.coefficients)
    task_heads = {
        task: heads_of(expert, result.coefficients, task, own_heads)
        for task, expert in theirs.items()
    }
    results = None
    if tested:
        with _measured("evaluating", seconds):
            run = _compiled(inputs.workspace)
            results = measure_results(
                lambda arrays, of_batch: run(arrays, of_batch)[0],
                ours,
                theirs,
                inputs.deltas,
                merged,
                task_heads,
                tested,
                parsed.evaluation.batch_size,
                f"learned ({result.coefficients.granularity})",
            )
    return Merged(
        coefficients=result.coefficients,
        results=results,
        predictions={} if results is None else predictions_in_memory(tested, results),
        stages=stages,
        recipe=parsed,
        record={**started, **_record(inputs, tested, seconds)},
        rebuild=ours.rebuild,
        arrays=merged,
        heads=task_heads,
    )


@contextmanager
def _measured(phase: str, seconds: dict[str, float]) -> Iterator[None]:
    """Measures the wall-clock time of a block."""
    began = time.perf_counter()
    yield
    seconds[phase] = round(time.perf_counter() - began, 3)


def _names_of_heads(base: Leaves[Any], patterns: Sequence[str]) -> list[str]:
    """Returns the names of the parameters that each task keeps for itself."""
    for pattern in patterns:
        _require_used("head_parameters", pattern, base)
    return [name for name in base.parameters if matches(name, patterns)]


def _require_used(field: str, pattern: str, base: Leaves[Any]) -> None:
    if not any(matches(name, [pattern]) for name in base.parameters):
        raise InputError(
            f"{field}: {pattern!r} fits no parameter; parameters are called e.g. "
            f"{next(iter(base.parameters))!r}"
        )


def _prepare(
    recipe: Recipe,
    base: Leaves[Any],
    experts: Mapping[str, Leaves[Any]],
    examples: Mapping[str, ArrayExamples],
    forward: Callable[[Any, Any], Any],
    own_heads: Sequence[str],
    names_heads: bool,
) -> LearningInputs:
    """Subtracts the base from its experts, and asks these for the targets of the objectives."""
    shapes = {name: a.shape for name, a in base.parameters.items() if name not in own_heads}
    models = OwnModels(sources_of(base, experts), shapes, experts)
    workspace = OwnWorkspace(
        models,
        base,
        forward,
        {task: {name: e.parameters[name] for name in own_heads} for task, e in experts.items()},
    )
    _require_labels(recipe, examples)
    # What each task keeps is no part of the family: the recipe's choice of heads is made here.
    method = build(recipe.model_copy(update={"heads": HeadsRecipe()}), models)
    method = method._replace(
        heads=_choose_heads(recipe, base, own_heads, names_heads),
        target_specs={t: spec._replace(cross_task=0) for t, spec in method.target_specs.items()},
    )
    for pattern in recipe.own_keep_from_base:
        _require_used("keep_from_base", pattern, base)
    calibration = calibrate(
        examples, batch_size=method.batch_size, held_out=method.held_out, seed=method.seed
    )
    for task, of_task in examples.items():
        _try_forward(workspace, task, of_task, method.target_specs[task])
    deltas, mixed, interference = _read_task_vectors(recipe, method, base, experts, shapes)
    require_any_merged(deltas)
    targets = _ask_experts(workspace, examples, method.target_specs, recipe.evaluation.batch_size)
    calibration = calibration._replace(
        targets={**calibration.targets, **targets},
        augmented=any(spec.augmented for spec in method.target_specs.values()),
    )
    arrays = {name: jnp.asarray(array) for name, array in base.arrays.items()}
    return LearningInputs(
        method,
        workspace,
        arrays,
        deltas,
        mixed,
        interference,
        calibration,
        theta_start=arrays,
        start=open_warm_start(method, models, Path()),
    )


def _require_labels(recipe: Recipe, examples: Mapping[str, ArrayExamples]) -> None:
    """Refuses objectives that need labels where a task has none."""
    for task, objective in build_objectives(recipe.objectives, recipe.tasks).items():
        if objective.target_spec.labels and examples[task].labels is None:
            raise InputError(
                f"data: {task!r} has no labels, and an objective needs them; give a tuple (inputs, "
                "labels), or choose an objective that needs none, such as logit_alignment"
            )


def _choose_heads(
    recipe: Recipe, base: Leaves[Any], own_heads: Sequence[str], is_named: bool
) -> HeadChoice:
    """Returns the choice of heads: that of a preset only where tasks have some.

    Raises:
        InputError: Heads are to be learned, and there are none, or they are no vectors or matrices.
    """
    chosen = recipe.heads
    is_named |= chosen != recipe.heads_of_preset
    if chosen.kind == "kept" or not (own_heads or is_named):
        return HeadChoice("kept")
    if not own_heads:
        raise InputError(
            "head_parameters: is missing, and heads are to be learned; give the name patterns of "
            "the parameters that each task keeps for itself"
        )
    for name in own_heads:
        if not 1 <= base.parameters[name].ndim <= 2:
            raise InputError(
                f"heads: are to be learned, and {name!r} has shape {base.parameters[name].shape}; "
                "only vectors and matrices are learned: take heads='kept'"
            )
    schedule = optax.cosine_decay_schedule(chosen.learning_rate, recipe.learning.steps)
    learning = HeadLearning(tuple(own_heads), optax.adam(schedule), chosen.ridge)
    return HeadChoice("learned", learning, fitted=False)


def _try_forward(
    workspace: OwnWorkspace,
    task: str,
    examples: ArrayExamples,
    spec: TargetSpec,
    argument: str = "data",
) -> None:
    """Traces `forward` on two examples of a task, and refuses what does not fit.

    Raises:
        InputError: It returns no logits or lacks what the objective asks for, or a label is none
            of its classes.
    """
    inputs = examples.take(np.array([0, 0]), examples.padded_length(np.array([0])))
    arrays = {**workspace.base.arrays, **workspace.heads[task]}
    outputs = jax.eval_shape(workspace.outputs, arrays, inputs)
    require_labels_in_range(task, examples, outputs.logits.shape[-1], argument)
    if missing := set(spec.hidden_states) - outputs.hidden_states.keys():
        raise InputError(
            f"forward: an objective asks for the hidden states of layer {min(missing)}; return "
            "TaskOutputs(logits, {layer: hidden_states})"
        )
    if spec.augmented and not {"pixel_values", "input_ids"} & inputs.keys():
        raise InputError(
            "objectives: pseudo_labels changes images and texts, which it knows by their names; "
            "give inputs by name as pixel_values [N, channels, height, width] or input_ids [N, T]"
        )


def _read_task_vectors(
    recipe: Recipe,
    method: Method,
    base: Leaves[Any],
    experts: Mapping[str, Leaves[Any]],
    shapes: Shapes,
) -> tuple[dict[str, DenseDelta], list[str], tuple[FittedStep, ...]]:
    """Returns the task vectors, the names without `*` of the tensors mixed, and fitted steps."""
    chosen = [name for name in shapes if not matches(name, recipe.keep_from_base)]
    deltas = task_vectors(
        {name: base.parameters[name] for name in chosen},
        {task: {n: e.parameters[n] for n in chosen} for task, e in experts.items()},
    )
    tensors = {
        tensor: (name, () if layer is None else layer)
        for tensor, name, layer in places({name: base.parameters[name] for name in deltas})
    }
    if not method.interference:
        changed = {
            name: np.asarray((delta.values != 0).any(range(1, delta.values.ndim)))
            for name, delta in deltas.items()
            if is_stacked(name)
        }
        mixed = [
            t for t, (name, layer) in tensors.items() if name not in changed or changed[name][layer]
        ]
        return deltas, mixed, ()
    values = {name: np.array(delta.values, np.float32) for name, delta in deltas.items()}
    by_tensor = {tensor: values[name][layer] for tensor, (name, layer) in tensors.items()}
    by_tensor = {tensor: rows for tensor, rows in by_tensor.items() if rows.any()}
    fitted = fit_steps(method.interference, by_tensor)
    changed_deltas = {
        name: DenseDelta(jnp.asarray(array, deltas[name].values.dtype))
        for name, array in values.items()
    }
    return changed_deltas, list(by_tensor), fitted


def _ask_experts(
    workspace: OwnWorkspace,
    examples: Mapping[str, ArrayExamples],
    specs: Mapping[str, TargetSpec],
    batch_size: int,
) -> dict[str, StoredTargets]:
    """Computes the targets of each expert for the examples of its task."""
    outputs = _compiled(workspace)
    targets = {}
    for task, spec in specs.items():
        if spec.expert:
            expert = workspace.models.experts[task].arrays
            ask = partial(outputs, {name: jnp.asarray(array) for name, array in expert.items()})
            size = min(batch_size, len(examples[task]))
            targets[task] = ask_expert(ask, examples[task], spec, batch_size=size)
    return targets


def _compiled(
    workspace: OwnWorkspace,
) -> Callable[[Mapping[str, Array], Mapping[str, Any]], tuple[Array, Mapping[int, Array]]]:
    """Returns the compiled function from arrays and inputs to logits and hidden states."""

    @jax.jit
    def outputs(
        arrays: Mapping[str, Array], inputs: Mapping[str, Array]
    ) -> tuple[Array, Mapping[int, Array]]:
        computed = workspace.outputs(arrays, inputs)
        return computed.logits, computed.hidden_states

    return outputs


def _record(
    inputs: LearningInputs, test: Mapping[str, ArrayExamples], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Returns the facts of a merge, as a run's record has them."""
    models = inputs.workspace.models
    return {
        **describe_machine(),
        **describe_data(inputs.calibration, test, language=False),
        "tensors": describe_tensors(models.base, (), inputs.mixed),
        "similarity": similarity(list(models.experts), inputs.deltas, inputs.shapes, inputs.mixed),
        "seconds": dict(seconds),
    }
