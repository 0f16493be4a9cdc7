"""Prepares task vectors and expert targets, then learns coefficients stage by stage."""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.file import Coefficients, unstack_values
from adamerge_jax.coefficients.granularities import (
    Granularity,
    PerTensor,
    Shapes,
    Values,
    constant,
    count_units,
    per_tensor,
)
from adamerge_jax.coefficients.importance import FROM_COARSE
from adamerge_jax.coefficients.initial_merge import InitialMerge
from adamerge_jax.data.batches import Calibration, calibrate
from adamerge_jax.data.copies import WithCopies, with_copies
from adamerge_jax.data.examples import Examples
from adamerge_jax.data.expert_targets import StoredTargets, ask_cross_task, ask_expert
from adamerge_jax.devices import Devices, fetch, is_first_process, return_freed_memory
from adamerge_jax.errors import InputError, NonFiniteObjectiveError
from adamerge_jax.evaluation.retention import RETAINED
from adamerge_jax.interference import FittedStep
from adamerge_jax.learning.forward import Forward
from adamerge_jax.learning.held_out import evaluate_held_out
from adamerge_jax.learning.learner import Frozen, Learner, make_learner
from adamerge_jax.learning.loop import Learned, Progress, Snapshot, learn
from adamerge_jax.learning.single_coefficient import best_single_coefficient
from adamerge_jax.learning.snapshots import load_snapshot, save_snapshot
from adamerge_jax.mixing import materialize_compiled, mix
from adamerge_jax.objectives import TargetSpec
from adamerge_jax.parameter_names import is_stacked, matches, stack_depths
from adamerge_jax.pipeline.heads import MOST_TO_FIT, HeadParameters, fit_heads
from adamerge_jax.pipeline.initial_merge import (
    fit_initial_merge,
    load_initial_merge,
    only_mixed,
    stored_tensors,
)
from adamerge_jax.pipeline.merge import Report, merge_from_data
from adamerge_jax.pipeline.models import Models
from adamerge_jax.pipeline.read import load_task_vectors
from adamerge_jax.pipeline.warm_start import WarmStart, initial_values, open_warm_start
from adamerge_jax.pipeline.workspace import Workspace
from adamerge_jax.recipes.build import GranularityChoice, Method, Stage
from adamerge_jax.runs.counting import ShowCount, count_silently
from adamerge_jax.stacks import Stacked
from adamerge_jax.task_vectors import Delta, LoadedDelta
from adamerge_jax.task_vectors.offload.memory import make_memory

OnStep = Callable[[Progress], None]

ShowStage = Callable[[str, int], AbstractContextManager[OnStep]]
"""The function `(summary of the stage, steps) -> on_step`; its result is a context manager."""


class LearningInputs(NamedTuple):
    """The inputs of learning.

    Attributes:
        method: The method by which coefficients are learned.
        workspace: The models and the data.
        base: The parameters of the base by name.
        deltas: The experts' task vectors, after the interference steps.
        mixed: The names without `*` of the tensors that are mixed.
        interference: The interference steps, fitted to the task vectors.
        calibration: The calibration data, with the targets of the objectives.
        theta_start: The parameters by name to which task vectors are added: those of the initial
            merge, or else the base's.
        initial_merge: The initial merge, with fitted interference steps, if there is one.
        start: The warm start; None for a start at the initial value.
    """

    method: Method
    workspace: Workspace
    base: dict[str, Array]
    deltas: dict[str, LoadedDelta]
    mixed: list[str]
    interference: tuple[FittedStep, ...]
    calibration: Calibration
    theta_start: dict[str, Array]
    initial_merge: InitialMerge | None = None
    start: WarmStart | None = None

    @property
    def shapes(self) -> Shapes:
        """The shapes of the mixed parameters, `(L, *shape)` where stacked."""
        return {name: self.workspace.models.shapes[name] for name in self.deltas}

    @property
    def devices(self) -> Devices:
        """The devices that learning runs on."""
        return self.workspace.models.devices

    @property
    def experts(self) -> int:
        """The number of experts, K."""
        return len(self.workspace.models.experts)


class MergeResult(NamedTuple):
    """A learned merge.

    Attributes:
        coefficients: The learned coefficients, as they are saved.
        granularity: The granularity of the coefficients.
        values: The coefficients by group, `[G, K, ...]`.
        deltas: The task vectors as the granularity prepared them.
        heads: The parameters of heads by task and name that are not the experts'.

    Examples:
        >>> import adamerge_jax as am
        >>> am.MergeResult._fields
        ('coefficients', 'granularity', 'values', 'deltas', 'heads')
    """

    coefficients: Coefficients
    granularity: Granularity
    values: Values
    deltas: Mapping[str, Delta]
    heads: HeadParameters = MappingProxyType({})

    @property
    def scales(self) -> dict[str, Array]:
        """The scale of each parameter, which broadcasts against its task vectors in `deltas`."""
        return self.granularity.scales({g: jnp.asarray(v) for g, v in self.values.items()})

    def parameters(self, theta_start: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the merged model's parameters by name.

        Args:
            theta_start: The parameters to which task vectors are added, as they were in learning.
        """
        return materialize_compiled(mix(theta_start, self.deltas, self.scales))

    def times(self, factors: Mapping[str, float]) -> "MergeResult":
        """Returns the merge with the coefficients of some experts multiplied with a factor.

        Args:
            factors: By expert; the others keep theirs. 0 leaves an expert out; heads stay.

        Raises:
            InputError: There is no such expert, or a factor or a product with it is not finite.
        """
        coefficients = self.coefficients.times(factors)
        by_expert = jnp.array([factors.get(name, 1.0) for name in coefficients.names])
        values = {  # [G, K, ...]
            group: array * by_expert.reshape(-1, *(1 for _ in array.shape[2:]))
            for group, array in self.values.items()
        }
        return self._replace(coefficients=coefficients, values=values)


def prepare(
    method: Method,
    workspace: Workspace,
    report: Report = lambda line: None,
    show_count: ShowCount = count_silently,
    *,
    asks: bool = True,
) -> LearningInputs:
    """Reads task vectors and computes the experts' targets for the objectives.

    Args:
        method: The method by which coefficients are learned.
        workspace: The models and the data.
        report: Shows how far an initial merge is that reads calibration data.
        show_count: Shows how many examples the experts have been run on.
        asks: If False, no expert is asked: `ask_experts` does so later, if it is needed.

    Raises:
        InputError: No expert differs from the base, an objective wants a layer that the model does
            not have, there are too few calibration examples, or the coefficients to start
            from are not for these models.
    """
    models = workspace.models
    start = open_warm_start(method, models, workspace.root)
    examples = workspace.data.calibration
    if workspace.general is not None and workspace.general.learning is not None:
        assert method.retained is not None  # both say so by the weight in the recipe
        examples = {**examples, RETAINED: workspace.general.learning}
        method = method.with_task(RETAINED, method.retained)
    calibration = calibrate(
        examples,
        batch_size=method.batch_size,
        held_out=method.held_out,
        seed=method.seed,
    )
    if RETAINED in examples:
        calibration = calibration.with_fewer_held_out(RETAINED)
    if method.copies:
        calibration = _with_copies(calibration, method)
    _require_layers(method.target_specs, models)
    initial_merge = None
    if method.initial_merge is not None:
        # Before the task vectors that learning needs are in memory, too.
        chosen = method.initial_merge
        initial_merge = fit_initial_merge(models, chosen.name, chosen.options)
    memory = make_memory(method.memory, models.devices)
    merge_of_data = None
    if initial_merge is not None and initial_merge.stored:
        merge_of_data = merge_from_data(workspace, initial_merge, memory, report)
    deltas, mixed, interference = load_task_vectors(
        models,
        method.delta_dtype,
        method.interference,
        memory,
    )
    return_freed_memory()
    require_any_merged(deltas)
    # A granularity that does not fit is refused before anything is learned or written.
    choice = method.result.granularity
    if choice.name in FROM_COARSE:
        from_coarse = FROM_COARSE[choice.name]
        from_coarse.require_fitting(choice.options, len(models.experts), len(mixed))
    else:
        choice.make({name: models.shapes[name] for name in deltas})
        _require_used_patterns(choice, mixed)
    base = workspace.base()
    theta_start = base
    if merge_of_data is not None:
        theta_start = only_mixed(models, merge_of_data, base, mixed)
    elif initial_merge is not None:
        theta_start = load_initial_merge(models, initial_merge, base, mixed)
    del merge_of_data
    inputs = LearningInputs(
        method,
        workspace,
        base,
        deltas,
        mixed,
        interference,
        calibration,
        theta_start,
        initial_merge,
        start,
    )
    return ask_experts(inputs, show_count) if asks else inputs


def may_pack(method: Method, models: Models) -> bool:
    """Returns True if the texts of a step may share rows: those of a whole batch, on one device."""
    return models.family.packs and method.microbatches == 1 and models.devices.mesh is None


def ask_experts(inputs: LearningInputs, show_count: ShowCount = count_silently) -> LearningInputs:
    """Computes the experts' targets for the objectives.

    Args:
        inputs: The inputs of learning, for which no expert has been asked yet.
        show_count: Shows how many examples the experts have been run on.

    Returns:
        The same with the targets.
    """
    method, workspace, calibration = inputs.method, inputs.workspace, inputs.calibration
    asked = {task: spec for task, spec in method.target_specs.items() if spec.expert}
    tally = workspace.evaluator.tally
    total = sum(_examples_asked(calibration, task, spec) for task, spec in asked.items())
    targets, cross_task = dict(calibration.targets), {}
    with tally.shown(show_count, "asking the experts: examples", total):
        for task, spec in asked.items():
            base = inputs.base
            expert = base if task == RETAINED else workspace.expert(task, base)
            examples = calibration.examples[task]
            targets[task] = _compute_targets(workspace, expert, task, spec, examples)
            if spec.cross_task:
                cross_task[task] = ask_cross_task(
                    partial(workspace.evaluator.logits, expert, task),
                    calibration.examples,
                    task,
                    calibration.learning,
                    limit=spec.cross_task,
                    seed=method.seed,
                )
            # Deleted before the next one is read, so that two experts are never in memory.
            del expert
            return_freed_memory()
    calibration = calibration._replace(
        targets=targets,
        augmented=any(spec.augmented for spec in method.target_specs.values()),
        cross_task=cross_task,
        prompts=[task for task, spec in method.target_specs.items() if spec.prompts],
    )
    if may_pack(method, workspace.models):
        calibration = calibration.packed()
    return inputs._replace(calibration=calibration)


def ask_for_logits(inputs: LearningInputs, calibration: Calibration) -> dict[str, StoredTargets]:
    """Computes each expert's logits on its task's examples, to fit heads to.

    Args:
        inputs: The models.
        calibration: The examples.
    """
    targets = {}
    for task, examples in calibration.examples.items():
        expert = inputs.workspace.expert(task, inputs.base)
        spec = TargetSpec(expert_logits=True)
        targets[task] = _compute_targets(inputs.workspace, expert, task, spec, examples)
        # Deleted before the next one is read, so that two experts are never in memory.
        del expert
    return targets


def _examples_asked(calibration: Calibration, task: str, spec: TargetSpec) -> int:
    """Returns the number of examples that a task's expert is run on."""
    others = [index for other, index in calibration.learning.items() if other != task]
    of_others = sum(min(spec.cross_task, len(index)) for index in others)
    return len(calibration.examples[task]) + of_others


def _with_copies(calibration: Calibration, method: Method) -> Calibration:
    """Adds changed copies of the examples that are learned from."""
    examples = {
        task: WithCopies(plain, method.copies_of(len(plain)), calibration.seed)
        for task, plain in calibration.examples.items()
    }
    learning = {
        task: with_copies(index, len(calibration.examples[task]), examples[task].copies)
        for task, index in calibration.learning.items()
    }
    targets = {task: StoredTargets(with_all) for task, with_all in examples.items()}
    return calibration._replace(learning=learning, examples=examples, targets=targets)


def with_fewer_copies(calibration: Calibration, most: int) -> Calibration:
    """Returns calibration data to fit heads to, with fewer changed copies of examples.

    Args:
        calibration: The calibration data.
        most: The number of a task's examples with their copies, at most, unless there are more
            without.
    """
    fewer = {
        task: examples.with_fewer(most)
        for task, examples in calibration.examples.items()
        if isinstance(examples, WithCopies)
    }
    targets = {task: calibration.targets[task].first(of_task) for task, of_task in fewer.items()}
    return calibration._replace(
        examples={**calibration.examples, **fewer}, targets={**calibration.targets, **targets}
    )


def require_any_merged(deltas: Mapping[str, object]) -> None:
    """Refuses a merge of nothing.

    Args:
        deltas: The task vectors by the name of the parameter that experts changed.

    Raises:
        InputError: No expert changed a parameter.
    """
    if not deltas:
        raise InputError("no expert differs from the base in any parameter that is merged")


def learn_coefficients(
    inputs: LearningInputs,
    *,
    show_stage: ShowStage = lambda summary, steps: nullcontext(lambda progress: None),
    show_count: ShowCount = count_silently,
    on_result: Callable[[Coefficients], None] = lambda coefficients: None,
    state: Path | None = None,
    learned: Coefficients | None = None,
) -> MergeResult:
    """Learns the coefficients of a method, stage by stage.

    Args:
        inputs: The inputs of learning.
        show_stage: The context manager of each stage; its value is called with every step's
            progress.
        show_count: Shows how many held-out examples an initial coefficient has been tried on, where
            one is chosen.
        on_result: The callback with each stage's coefficients; if learning diverges, with the last
            good ones.
        state: The folder in which each stage saves its state at every held-out evaluation, and
            from which it resumes.
        learned: The coefficients that the run in `state` has learned, if it has ended: then nothing
            is computed again, and no expert need have been asked.

    Returns:
        The merge by the coefficients of the last stage.

    Raises:
        InputError: The granularity does not fit the parameters.
        NonFiniteObjectiveError: Learning diverged.
    """
    if learned is not None:
        inputs = inputs._replace(method=inputs.method._replace(initial=learned.initial))
    start: WarmStart | PerTensor | None = inputs.start
    if start is None and learned is not None:
        start = constant(inputs.shapes, inputs.experts, learned.initial)
    if start is None and not inputs.method.chooses_initial:
        start = constant(inputs.shapes, inputs.experts, inputs.method.initial)
    result = None
    for stage in inputs.method.stages:
        if result is not None:
            start = per_tensor(result.granularity, result.values, inputs.shapes, inputs.experts)
            stage = _resolve_granularity(inputs, stage, start)
        result = _learn_stage(inputs, stage, start, show_stage, show_count, on_result, state)
        initial = result.coefficients.initial
        inputs = inputs._replace(method=inputs.method._replace(initial=initial))
    assert result is not None
    choice, seed = inputs.method.heads, inputs.method.seed
    if learned is not None:
        return result._replace(coefficients=learned, heads=learned.head_tensors)
    if choice.fit is None:
        return result
    parameters = result.parameters(inputs.theta_start)
    calibration = with_fewer_copies(inputs.calibration, MOST_TO_FIT)
    heads = fit_heads(inputs.workspace, parameters, calibration, choice.fit, seed)
    coefficients = dataclasses.replace(result.coefficients, heads=choice.kind, head_tensors=heads)
    on_result(coefficients)
    return result._replace(coefficients=coefficients, heads=heads)


def learner_of(
    method: Method, stage: Stage, forward: Forward, devices: Devices, granularity: Granularity
) -> Learner:
    """Returns the compiled functions of one stage.

    Args:
        method: The method by which coefficients are learned.
        stage: The stage.
        forward: Runs the merged model with the head of each task.
        devices: The devices that it runs on.
        granularity: The granularity of the coefficients.
    """
    return make_learner(
        forward,
        granularity,
        CONSTRAINTS[method.constraint],
        list(method.objectives.values()),
        stage.optimizer,
        method.regularizers,
        method.microbatches,
        devices,
        method.heads.learning if stage.name == method.result.name else None,
        method.mixes_once,
    )


def _resolve_granularity(inputs: LearningInputs, stage: Stage, coarse: PerTensor) -> Stage:
    """Returns the stage with a granularity that depends on coarse coefficients made definite."""
    name, options = stage.granularity
    if name not in FROM_COARSE:
        return stage
    shapes, coefficients, magnitudes = {}, {}, {}
    models = inputs.workspace.models
    for parameter, delta in inputs.deltas.items():
        norms = np.atleast_2d(fetch(delta.norms(stacked=is_stacked(parameter))))
        for layer, tensor in enumerate(models.tensors(parameter)):
            if tensor in inputs.mixed:
                shapes[tensor] = models.base.shape(tensor)
                coefficients[tensor] = np.asarray(coarse[parameter][layer])
                magnitudes[tensor] = norms[layer]
    resolved = FROM_COARSE[name].resolve(options, shapes, coefficients, magnitudes)
    return stage._replace(granularity=GranularityChoice(FROM_COARSE[name].granularity, resolved))


def _require_used_patterns(choice: GranularityChoice, mixed: list[str]) -> None:
    """Refuses name patterns of a granularity that fit no tensor."""
    patterns: list[str] = []
    if choice.name == "groups":
        patterns = [p for patterns in choice.options["patterns"].values() for p in patterns]
    elif isinstance(choice.options.get("pieces"), Mapping):
        patterns = list(choice.options["pieces"])
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in mixed):
            raise InputError(
                f"coefficients.granularity_options: {pattern!r} fits no merged tensor; "
                f"tensors are called e.g. {mixed[0]!r}"
            )


def _learn_stage(
    inputs: LearningInputs,
    stage: Stage,
    start: WarmStart | PerTensor | None,
    show_stage: ShowStage,
    show_count: ShowCount,
    on_result: Callable[[Coefficients], None],
    state: Path | None,
) -> MergeResult:
    method, workspace, devices = inputs.method, inputs.workspace, inputs.devices
    granularity = stage.granularity.make(inputs.shapes)
    deltas = {
        name: inputs.devices.delta(name, granularity.prepare(name, delta))
        for name, delta in inputs.deltas.items()
    }
    forward = workspace.forward(method.target_specs.values())
    learner = learner_of(method, stage, forward, devices, granularity)
    expert_heads = Stacked.of(list(workspace.heads.values()))
    frozen = Frozen(inputs.theta_start, deltas, expert_heads)
    if start is None:
        held_out = sum(map(len, inputs.calibration.held_out.values()))

        def objective(coefficient: float) -> float:
            """Returns the objective of one coefficient on the held-out data, over all tasks."""
            values = granularity.init(constant(inputs.shapes, inputs.experts, coefficient))
            first = devices.replicate(learner.init(values, expert_heads))
            words = f"trying the initial coefficient {coefficient:g}: held-out examples"
            with show_count(words, held_out) as on_count:
                metrics = evaluate_held_out(
                    learner, first, frozen, inputs.calibration, devices, on_count
                )
            return float(metrics.objective.sum())

        best = best_single_coefficient(objective)
        inputs = inputs._replace(method=method._replace(initial=best))
        start = constant(inputs.shapes, inputs.experts, best)
    if isinstance(start, WarmStart):
        initial = initial_values(
            start,
            granularity,
            stage.granularity,
            CONSTRAINTS[method.constraint],
            inputs.shapes,
            inputs.experts,
        )
    else:
        initial = granularity.init(start)
    folder = None if state is None else state / stage.name
    resume = folder and load_snapshot(folder, Snapshot.like(learner, initial, expert_heads))

    def on_snapshot(snapshot: Snapshot) -> None:
        if folder is not None and is_first_process():
            save_snapshot(folder, snapshot.step, snapshot)

    summary = f"{stage.name}: {count_units(granularity, initial, inputs.shapes)}"
    if method.chooses_initial and isinstance(start, Mapping) and stage is method.stages[0]:
        summary += f", all from {inputs.method.initial:g}, which has the lowest objective"
    try:
        with show_stage(summary, stage.steps) as on_step:
            learned = learn(
                learner,
                frozen,
                initial,
                inputs.calibration,
                steps=stage.steps,
                evaluate_every=stage.evaluate_every,
                control=method.control,
                on_step=on_step,
                on_snapshot=on_snapshot,
                resume=resume,
                devices=devices,
            )
    except NonFiniteObjectiveError as error:
        if error.learned is not None:
            on_result(_coefficients_of(inputs, stage, error.learned))
        raise
    coefficients = _coefficients_of(inputs, stage, learned)
    on_result(coefficients)
    heads = coefficients.head_tensors
    return MergeResult(coefficients, granularity, learned.values, deltas, heads)


def _coefficients_of(inputs: LearningInputs, stage: Stage, learned: Learned) -> Coefficients:
    """Returns what a stage has learned, with all facts that a later merge needs."""
    coefficients = make_coefficients(inputs, stage.granularity, learned.values, learned.step)
    if not learned.heads:
        return coefficients
    heads = dict(zip(inputs.workspace.heads, learned.heads, strict=True))
    return dataclasses.replace(coefficients, heads="learned", head_tensors=heads)


def make_coefficients(
    inputs: LearningInputs, granularity: GranularityChoice, values: Values, step: int
) -> Coefficients:
    """Returns coefficients with all facts that a later merge needs.

    Args:
        inputs: The models, task vectors and method of the run.
        granularity: The granularity of the coefficients.
        values: The coefficients by group, `[G, K, ...]`.
        step: The number of steps or evaluations after which they were reached.
    """
    method, models = inputs.method, inputs.workspace.models
    shapes = {name: models.base.shape(name) for name in inputs.mixed}
    # A layer that no expert changed is in a stack with those that some did, but is not mixed.
    groups = granularity.make(shapes).init(constant(shapes, 1, 0.0))
    unstacked = unstack_values(values)
    base, *experts = models.sources
    initial_merge, tensors = inputs.initial_merge, {}
    if initial_merge is not None and initial_merge.stored:
        tensors = stored_tensors(models, inputs.theta_start, inputs.mixed)
    return Coefficients(
        values={group: unstacked[group] for group in groups},
        granularity=granularity.name,
        granularity_options=granularity.options,
        interference=inputs.interference,
        constraint=method.constraint,
        shapes=shapes,
        base=base,
        experts=tuple(experts),
        objective=method.objective_in_words,
        seed=method.seed,
        step=step,
        started_from=inputs.start.source if inputs.start else None,
        depths=stack_depths(models.base.names),
        initial=inputs.method.initial,
        initial_merge=initial_merge,
        initial_tensors=tensors,
    )


def _compute_targets(
    workspace: Workspace,
    parameters: Mapping[str, Array],
    task: str,
    spec: TargetSpec,
    examples: Examples,
) -> StoredTargets:
    """Computes the targets of a task's expert for its calibration examples."""

    def ask(inputs: dict[str, np.ndarray]) -> tuple[Array, dict[int, Array]]:
        return workspace.evaluator.run(parameters, task, inputs, hidden_states=spec.hidden_states)

    return ask_expert(ask, examples, spec, batch_size=workspace.evaluator.batch_size)


def _require_layers(target_specs: Mapping[str, TargetSpec], models: Models) -> None:
    """Refuses hidden states of a layer that the model does not have."""
    depths = (shape[0] for name, shape in models.shapes.items() if is_stacked(name))
    count = max(depths, default=0)
    if models.config.is_encoder_decoder:
        # Hidden states are the decoder's, and the encoder may have more layers.
        fields = ("num_decoder_layers", "decoder_layers")  # T5's, and BART's
        config = models.config
        count = next((getattr(config, name) for name in fields if hasattr(config, name)), count)
    elif models.family.bridged:
        # Its layers are not stacked; some models, such as a ResNet, do not say how many there are.
        config = models.config.get_text_config()
        count = getattr(config, "num_hidden_layers", count)
    for spec in target_specs.values():
        for layer in spec.hidden_states:
            if not -count - 1 <= layer <= count:
                raise InputError(
                    f"objectives: hidden states of layer {layer} are asked for; the model has "
                    f"layers 0 (the embeddings) to {count}, or -1 (the last) to {-count - 1}"
                )
