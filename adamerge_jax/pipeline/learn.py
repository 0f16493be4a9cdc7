"""From a recipe and its workspace to learned coefficients: the steps of a merge in their order."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import NamedTuple

import jax
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
    make_granularity,
    per_tensor,
)
from adamerge_jax.coefficients.importance import importance_pieces, require_budget
from adamerge_jax.data.batches import Calibration, calibrate
from adamerge_jax.data.examples import Concatenated, Subset
from adamerge_jax.data.expert_targets import StoredTargets, ask_expert
from adamerge_jax.devices import Devices, fetch
from adamerge_jax.errors import InputError
from adamerge_jax.interference import FittedStep
from adamerge_jax.learning import learner as learning
from adamerge_jax.learning.snapshots import Snapshots
from adamerge_jax.mixing import materialize, mix
from adamerge_jax.models.family import Network
from adamerge_jax.objectives import Needs
from adamerge_jax.parameter_names import is_stacked, matches, stack_depths
from adamerge_jax.pipeline.inputs import Workspace
from adamerge_jax.pipeline.models import Models
from adamerge_jax.pipeline.read import DELTA_DTYPES, load_task_vectors
from adamerge_jax.pipeline.warm_start import Start, begin, open_start
from adamerge_jax.recipes.schema import IMPORTANCE_CHUNK, ObjectiveRecipe, Recipe
from adamerge_jax.task_vectors import Delta, LoadedDelta
from adamerge_jax.task_vectors.offload.memory import make_memory

Watch = Callable[[str, int], AbstractContextManager[Callable[[learning.Progress], None]]]
"""`(what is learned, steps) -> what is called with every step's progress`.

What is learned is the name of the stage, a colon, and the number of coefficients.
"""


class Problem(NamedTuple):
    """All that learning starts from.

    Attributes:
        recipe: Says how to learn.
        workspace: Models and data.
        base: Parameters of the base.
        deltas: The experts' task vectors, after the interference steps.
        mixed: Names without `*` of the tensors that are mixed.
        interference: The interference steps, with what they learned of the task vectors.
        calibration: Batches, with the targets that the objective needs.
        start: Where coefficients start, if something was learned before.
    """

    recipe: Recipe
    workspace: Workspace
    base: dict[str, Array]
    deltas: dict[str, LoadedDelta]
    mixed: list[str]
    interference: tuple[FittedStep, ...]
    calibration: Calibration
    start: Start | None = None

    @property
    def shapes(self) -> Shapes:
        """Shapes of the mixed parameters, `(L, *shape)` where stacked."""
        return {name: self.workspace.models.shapes[name] for name in self.deltas}

    @property
    def devices(self) -> Devices:
        """Where it runs."""
        return self.workspace.models.devices

    @property
    def experts(self) -> int:
        """K."""
        return len(self.workspace.models.experts)


class Merge(NamedTuple):
    """A learned merge.

    Attributes:
        coefficients: The artefact.
        granularity: Which parameters share a coefficient.
        values: The coefficients by group, `[G, K, ...]`.
        deltas: Task vectors as the granularity prepared them.
    """

    coefficients: Coefficients
    granularity: Granularity
    values: Values
    deltas: Mapping[str, Delta]

    @property
    def scales(self) -> dict[str, Array]:
        """The scale of each parameter, for `deltas`."""
        return self.granularity.scales({g: jnp.asarray(v) for g, v in self.values.items()})

    def parameters(self, base: Mapping[str, Array]) -> dict[str, Array]:
        """The merged model's parameters."""
        return merged_parameters(base, self.deltas, self.scales)


merged_parameters = jax.jit(lambda base, deltas, scales: materialize(mix(base, deltas, scales)))
"""`(base, deltas, scales) -> parameters` of the merged model, all at once."""


def pose(recipe: Recipe, workspace: Workspace) -> Problem:
    """Reads task vectors and asks the experts for what the objective needs.

    Raises:
        InputError: No expert differs from the base, an objective asks for a layer that the model
            does not have, there are too few calibration examples, or the coefficients to start
            from are not for these models.
    """
    models = workspace.models
    start = open_start(recipe, models, _first_granularity(recipe, models), workspace.root)
    calibration = calibrate(
        workspace.data.calibration,
        batch_size=recipe.learning.batch_size,
        held_out=recipe.learning.held_out,
        seed=recipe.seed,
    )
    needs = needs_of(recipe, models)
    _require_layers(needs, models)
    _require_fitting_objectives(recipe, models, needs)
    _require_fitting_optimizer(recipe)
    kept = recipe.task_vectors
    deltas, mixed, interference = load_task_vectors(
        models,
        DELTA_DTYPES[kept.dtype] if kept.dtype else workspace.dtype,
        recipe.build_interference(),
        make_memory(kept.memory, models.devices),
    )
    require_any_merged(deltas)
    # What does not fit is to be known before anything is learned or written.
    if recipe.coefficients.granularity == IMPORTANCE_CHUNK:
        require_budget(
            recipe.coefficients.granularity_options["budget"], len(models.experts), len(mixed)
        )
    else:
        shapes = {name: models.shapes[name] for name in deltas}
        make_granularity(*granularity_of(recipe, models), shapes)
        _require_used_patterns(recipe, mixed)
    if recipe.learning.control is not None and not models.family.language:
        # What is controlled without labels is the agreement with the experts.
        needs = {task: own._replace(expert_logits=True) for task, own in needs.items()}
    base = workspace.base()
    targets, elsewhere = dict(calibration.targets), {}
    for task, own in needs.items():
        if not own.expert:
            continue
        parameters = workspace.expert(task, base)
        targets[task] = _ask_expert(recipe, workspace, parameters, task, own)
        if own.elsewhere:
            elsewhere[task] = _ask_elsewhere(
                workspace, parameters, task, calibration.learning, own.elsewhere, recipe.seed
            )
        # Gone before the next one is read: two experts need never be in memory.
        del parameters
    calibration = calibration._replace(
        targets=targets,
        strong_view=any(own.strong_view for own in needs.values()),
        elsewhere=elsewhere,
    )
    return Problem(recipe, workspace, base, deltas, mixed, interference, calibration, start)


def require_any_merged(deltas: Mapping[str, object]) -> None:
    """Refuses a merge of nothing.

    Args:
        deltas: By name of the parameter that experts changed.

    Raises:
        InputError: There is none.
    """
    if not deltas:
        raise InputError("no expert differs from the base in any parameter that is merged")


def needs_of(recipe: Recipe, models: Models) -> dict[str, Needs]:
    """What the objective of each task must be given."""
    needs = {task: objective.needs for task, objective in recipe.build_objectives().items()}
    if models.family.language or len(needs) == 1:
        # One output layer for all tasks: experts would contradict each other. Of one task: there
        # are no others.
        needs = {task: own._replace(elsewhere=0) for task, own in needs.items()}
    return needs


def learn_coefficients(
    problem: Problem,
    *,
    watch: Watch,
    keep: Callable[[Coefficients], None] = lambda found: None,
    state: Path | None = None,
) -> Merge:
    """Learns the coefficients of a recipe, coarse ones first where it says so.

    Args:
        problem: What to learn from.
        watch: Shows progress.
        keep: Called with the result; where learning diverges, with the last good coefficients.
        state: Folder in which each stage keeps its state at every look at the held-out data, and
            from which it goes on.

    Raises:
        InputError: The granularity does not fit the parameters.
        NonFiniteObjectiveError: Learning diverged.
    """
    recipe = problem.recipe
    chosen = recipe.coefficients
    start = problem.start
    if start is None:
        start = constant(problem.shapes, problem.experts, recipe.initial_coefficient)
    name, options = granularity_of(recipe, problem.workspace.models)
    if chosen.coarse is not None:
        stage = _Stage("coarse", chosen.coarse.granularity, {}, chosen.coarse.steps)
        coarse = _learn_stage(problem, stage, start, watch, keep, state)
        start = per_tensor(coarse.granularity, coarse.values, problem.shapes, problem.experts)
        if name == IMPORTANCE_CHUNK:
            name, options = "chunk", {"pieces": _importance(problem, start, options["budget"])}
    stage = _Stage("learning", name, options, recipe.learning.steps)
    return _learn_stage(problem, stage, start, watch, keep, state)


def _first_granularity(recipe: Recipe, models: Models) -> tuple[str, Mapping[str, object]]:
    """The granularity of what is learned first."""
    if recipe.coefficients.coarse is not None:
        return recipe.coefficients.coarse.granularity, {}
    return granularity_of(recipe, models)


def granularity_of(recipe: Recipe, models: Models) -> tuple[str, Mapping[str, object]]:
    """The granularity of a recipe, with the recipe's seed and the model's attention heads."""
    name, options = recipe.coefficients.granularity, recipe.coefficients.granularity_options
    if name == "partition":
        options = {"seed": recipe.seed} | options
    if name == "head" and not options:
        options = {"heads": models.family.heads(models.config)}
    return name, options


def learner_of(
    recipe: Recipe,
    models: Models,
    backbone: Network,
    heads: Sequence[Network],
    granularity: Granularity,
    steps: int,
) -> learning.Learner:
    """How coefficients of a granularity are learned as a recipe says.

    Args:
        recipe: Says how.
        models: The base and its experts.
        backbone: What is merged, as a function of its parameters.
        heads: Each task's head as a function of its parameters.
        granularity: Which parameters share a coefficient.
        steps: Number of optimizer steps.
    """
    needs = needs_of(recipe, models).values()
    return learning.make_learner(
        learning.forward_with_heads(
            backbone,
            heads,
            sorted({layer for own in needs for layer in own.hidden_states}),
            elsewhere=any(own.elsewhere for own in needs),
            logits_again=models.family.language,
        ),
        granularity,
        CONSTRAINTS[recipe.coefficients.constraint],
        list(recipe.build_objectives().values()),
        recipe.learning.optimizer.build(steps),
        recipe.build_regularizers(),
        recipe.learning.microbatches,
        models.devices,
    )


def _require_used_patterns(recipe: Recipe, mixed: list[str]) -> None:
    """Refuses name patterns of a granularity that fit no tensor."""
    options = recipe.coefficients.granularity_options
    patterns = []
    if recipe.coefficients.granularity == "groups":
        patterns = [pattern for own in options["patterns"].values() for pattern in own]
    elif isinstance(options.get("pieces"), Mapping):
        patterns = list(options["pieces"])
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in mixed):
            raise InputError(
                f"coefficients.granularity_options: {pattern!r} fits no merged tensor; "
                f"tensors are called e.g. {mixed[0]!r}"
            )


class _Stage(NamedTuple):
    """One run of the learning loop: what it is called, what it learns, for how long."""

    name: str
    granularity: str
    options: Mapping[str, object]
    steps: int


def _learn_stage(
    problem: Problem,
    stage: _Stage,
    start: Start | PerTensor,
    watch: Watch,
    keep: Callable[[Coefficients], None],
    state: Path | None,
) -> Merge:
    recipe, workspace = problem.recipe, problem.workspace
    granularity = make_granularity(stage.granularity, stage.options, problem.shapes)
    deltas = {
        name: problem.devices.delta(name, granularity.prepare(name, delta))
        for name, delta in problem.deltas.items()
    }
    networks = list(workspace.head_networks.values())
    learner = learner_of(
        recipe, workspace.models, workspace.backbone, networks, granularity, stage.steps
    )
    control = None
    if recipe.forgotten:
        kept = tuple(k for k, task in enumerate(recipe.tasks) if task not in recipe.forgotten)
        control = learning.Control(kept, recipe.learning.control)

    def describe(learned: learning.Learned) -> Coefficients:
        return _describe(problem, stage, learned)

    if isinstance(start, Start):
        chosen, constraint = (stage.granularity, stage.options), recipe.coefficients.constraint
        initial = begin(
            start, granularity, chosen, CONSTRAINTS[constraint], problem.shapes, problem.experts
        )
    else:
        initial = granularity.init(start)
    snapshots = None if state is None else Snapshots(state / stage.name)
    resume = snapshots and snapshots.load(learning.Snapshot.like(learner, initial))

    def save(snapshot: learning.Snapshot) -> None:
        if snapshots is not None:
            snapshots.save(snapshot.step, snapshot)

    summary = f"{stage.name}: {count_units(granularity, initial, problem.shapes)}"
    try:
        with (
            watch(summary, stage.steps) as show,
            closing(snapshots) if snapshots else nullcontext(),
        ):
            learned = learning.learn(
                learner,
                learning.Frozen(problem.base, deltas, list(workspace.heads.values())),
                initial,
                problem.calibration,
                steps=stage.steps,
                evaluate_every=recipe.learning.evaluate_every or max(1, stage.steps // 10),
                control=control,
                report=show,
                resume=resume,
                save=save,
                devices=problem.devices,
            )
    except learning.NonFiniteObjectiveError as error:
        if error.learned is not None:
            keep(describe(error.learned))
        raise
    coefficients = describe(learned)
    keep(coefficients)
    return Merge(coefficients, granularity, learned.values, deltas)


def _describe(problem: Problem, stage: _Stage, learned: learning.Learned) -> Coefficients:
    """The learned coefficients with all that a later merge must know of them."""
    recipe, models = problem.recipe, problem.workspace.models
    shapes = {name: models.base.shape(name) for name in problem.mixed}
    # A layer that no expert changed is in a stack with those that some did, but is not mixed.
    used = make_granularity(stage.granularity, stage.options, shapes).init(constant(shapes, 1, 0.0))
    values = unstack_values(learned.values)
    base, *experts = models.sources
    return Coefficients(
        values={group: values[group] for group in used},
        granularity=stage.granularity,
        granularity_options=stage.options,
        interference=problem.interference,
        constraint=recipe.coefficients.constraint,
        shapes=shapes,
        base=base,
        experts=tuple(experts),
        objective=" + ".join(map(_in_words, recipe.objectives)),
        seed=recipe.seed,
        step=learned.step,
        started_from=problem.start.source if problem.start else None,
        depths=stack_depths(models.base.names),
    )


def _in_words(term: ObjectiveRecipe) -> str:
    if isinstance(term.weight, dict):
        return f"{term.name} ({', '.join(f'{task} {w:g}' for task, w in term.weight.items())})"
    return term.name if term.weight == 1 else f"{term.weight:g} {term.name}"


def _ask_expert(
    recipe: Recipe,
    workspace: Workspace,
    parameters: Mapping[str, Array],
    task: str,
    needs: Needs,
) -> StoredTargets:
    """What a task's expert says of its calibration examples."""

    def ask(inputs: dict[str, np.ndarray]) -> tuple[Array, dict[int, Array]]:
        return workspace.evaluator.run(parameters, task, inputs, hidden_states=needs.hidden_states)

    examples = workspace.data.calibration[task]
    return ask_expert(ask, examples, needs, batch_size=recipe.evaluation.batch_size)


def _ask_elsewhere(
    workspace: Workspace,
    parameters: Mapping[str, Array],
    task: str,
    learning: Mapping[str, np.ndarray],
    limit: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """What a task's expert says of the calibration examples of each other task, `[N, C]`.

    It is asked of at most `limit` examples of each that coefficients are learned from; the rows of
    all others are NaN.
    """
    others = {o: own for o, own in workspace.data.calibration.items() if o != task}
    generator = np.random.default_rng([seed, 5, list(learning).index(task)])
    asked = {other: generator.permutation(learning[other])[:limit] for other in others}
    # All at once, so that texts of like length share a batch across tasks.
    chosen = [Subset(own, asked[other]) for other, own in others.items()]
    said = workspace.evaluator.logits(parameters, task, Concatenated(chosen))
    by_task = {}
    for other, own in others.items():
        rows, said = np.split(said, [len(asked[other])])
        by_task[other] = np.full((len(own), rows.shape[1]), np.nan, rows.dtype)
        by_task[other][asked[other]] = rows
    return by_task


def _require_fitting_objectives(recipe: Recipe, models: Models, needs: Mapping[str, Needs]) -> None:
    """Refuses objectives that do not go with this kind of model, and labels that are missing."""
    for task, own in needs.items():
        if models.family.language:
            if own.strong_view:
                raise InputError(
                    "objectives: pseudo_labels is for classes; a language model has none"
                )
            continue
        if own.labels and recipe.tasks[task].calibration.label is None:
            raise InputError(
                f"tasks.{task}.calibration.label: is missing, and an objective needs labels; "
                "name the column of the class index, or choose an objective that needs none"
            )


def _require_fitting_optimizer(recipe: Recipe) -> None:
    """Refuses an optimizer that a gradient is not enough for, such as one with a line search."""
    optimizer = recipe.learning.optimizer.build(recipe.learning.steps)
    try:
        jax.eval_shape(lambda one: optimizer.update(one, optimizer.init(one), one), jnp.zeros(1))
    except TypeError as error:
        raise InputError(
            f"learning.optimizer.name: optax.{recipe.learning.optimizer.name} asks for more than "
            "a gradient in each step; use e.g. adam"
        ) from error


def _require_layers(needs: Mapping[str, Needs], models: Models) -> None:
    """Refuses hidden states of a layer that the model does not have."""
    depths = (shape[0] for name, shape in models.shapes.items() if is_stacked(name))
    count = max(depths, default=0)
    if models.config.is_encoder_decoder:
        # Hidden states are the decoder's, and the encoder may have more layers.
        count = models.config.num_decoder_layers
    for own in needs.values():
        for layer in own.hidden_states:
            if not -count - 1 <= layer <= count:
                raise InputError(
                    f"objectives: hidden states of layer {layer} are asked for; the model has "
                    f"layers 0 (the embeddings) to {count}, or -1 (the last) to {-count - 1}"
                )


def _importance(problem: Problem, coefficients: PerTensor, budget: int) -> dict[str, int]:
    """How many pieces every tensor is cut into, from coarse coefficients."""
    shapes, learned, magnitudes = {}, {}, {}
    for name, delta in problem.deltas.items():
        tensors = problem.workspace.models.tensors(name)
        norms = np.atleast_2d(fetch(delta.norms(stacked=is_stacked(name))))
        for layer, tensor in enumerate(tensors):
            if tensor in problem.mixed:
                shapes[tensor] = problem.workspace.models.base.shape(tensor)
                learned[tensor] = np.asarray(coefficients[name][layer])
                magnitudes[tensor] = norms[layer]
    return importance_pieces(shapes, learned, magnitudes, budget)
