"""Learning merge coefficients: the compiled step, and the loop around it.

A `Learner` is a set of pure functions, made once from the choices of a recipe. All arrays are
arguments of the compiled functions; none is closed over.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from adamerge_jax.coefficients.constraints import Constraint
from adamerge_jax.coefficients.granularities import Granularity, Values
from adamerge_jax.data.batches import Batch, Calibration
from adamerge_jax.devices import ONE_DEVICE, Devices
from adamerge_jax.errors import NonFiniteObjectiveError
from adamerge_jax.learning.microbatches import split
from adamerge_jax.mixing import mix
from adamerge_jax.models.family import Network, complete_head
from adamerge_jax.objectives import (
    NOT_PREDICTED,
    Objective,
    Targets,
    TaskOutputs,
    require_given,
)
from adamerge_jax.objectives.regularizers import Regularizer
from adamerge_jax.task_vectors import Delta

Forward = Callable[[PyTree, PyTree, PyTree], Sequence[TaskOutputs]]
"""`(parameters, heads, inputs) -> outputs` of each task, from parameters that may be mixtures.

In place of a task's logits there may be a function that computes them.
"""


class Frozen(NamedTuple):
    """The arrays that stay as they are while coefficients are learned.

    Attributes:
        base: Parameters of the base model, any pytree.
        deltas: The experts' deltas by parameter name, as the granularity prepared them.
        heads: What each task keeps for itself, any pytree.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax import Frozen, task_vectors
        >>> base = {"kernel": jnp.zeros((2, 3))}
        >>> experts = [{"kernel": jnp.ones((2, 3))}, {"kernel": -jnp.ones((2, 3))}]
        >>> frozen = Frozen(base, task_vectors(base, experts), heads=())
        >>> frozen.deltas["kernel"].values.shape  # [K, *shape]
        (2, 2, 3)
    """

    base: PyTree[Array]
    deltas: Mapping[str, Delta]
    heads: PyTree[Array]


class State(NamedTuple):
    """What changes from step to step.

    Attributes:
        raw: Unconstrained arrays, which the constraint turns into coefficients.
        optimizer: The optimizer's own state.
        start: The coefficients that learning started from, for regularizers.
    """

    raw: Values
    optimizer: optax.OptState
    start: Values


class Evaluation(NamedTuple):
    """What is known of some examples without learning from them.

    Attributes:
        objective: Of each task, `[tasks]`.
        predicted: Class that the merged model gives each example, `[tasks, B]`, or each position
            of it, `[tasks, B, T]`.
    """

    objective: Float[Array, " tasks"]
    predicted: Int[Array, "tasks B ..."]


class Learner(NamedTuple):
    """How coefficients are learned.

    Attributes:
        init: `coefficients -> State`.
        step: `(state, frozen, batch) -> (State, objective of each task [tasks])`, compiled; the
            objective is that of the state before the step.
        evaluate: `(state, frozen, batch) -> Evaluation`, compiled.
        coefficients: `state -> coefficients` by group, `[G, K, ...]`.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from adamerge_jax import CONSTRAINTS, granularities, make_learner, objectives
        >>> def forward(parameters, heads, inputs):  # here only what surrounds it is shown
        ...     raise NotImplementedError
        >>> granularity = granularities.task({"kernel": (2, 3)})
        >>> optimizer = optax.adam(1e-2)
        >>> learner = make_learner(
        ...     forward, granularity, CONSTRAINTS["clip"], objectives.entropy(), optimizer
        ... )
        >>> state = learner.init({"all": jnp.array([[0.25, 0.5]])})  # [G, K]: two experts
        >>> learner.coefficients(state)["all"].tolist()
        [[0.25, 0.5]]
    """

    init: Callable[[Values], State]
    step: Callable[[State, Frozen, Batch], tuple[State, Float[Array, " tasks"]]]
    evaluate: Callable[[State, Frozen, Batch], Evaluation]
    coefficients: Callable[[State], Values]


def make_learner(
    forward: Forward,
    granularity: Granularity,
    constraint: Constraint,
    objective: Objective | Sequence[Objective],
    optimizer: optax.GradientTransformation,
    regularizers: Sequence[tuple[float, Regularizer]] = (),
    microbatches: int = 1,
    devices: Devices = ONE_DEVICE,
) -> Learner:
    """Puts the choices of a recipe together.

    With `entropy` as the objective this is AdaMerging (Yang et al., ICLR 2024, eq. 7): entropies
    are averaged over each task's examples and summed over tasks. The parameters are mixed once
    for all tasks of a step.

    Args:
        forward: Runs the merged model on the examples of all tasks, `[tasks * B, ...]`, and
            applies each task's head: `(parameters, heads, inputs) -> outputs` of each task.
        granularity: Which parameters share a coefficient.
        constraint: Which values coefficients may take.
        objective: What is minimised, for all tasks or for each.
        optimizer: Any optax transformation.
        regularizers: What is added to the sum over tasks, with their weights.
        microbatches: In how many parts a step runs its batch, one after the other.
        devices: Where it runs; each has all coefficients and the whole state of the optimizer.

    Returns:
        Pure functions; `learn` is the loop around them.

    Examples:
        A classifier `x @ kernel` with three inputs and two classes, and an expert for each class.
        `forward` gets parameters that may be mixtures, and the examples of all tasks one task
        after the other, `[tasks * B, ...]`; it returns the outputs of each task.

        >>> import jax.numpy as jnp
        >>> import optax
        >>> from adamerge_jax import CONSTRAINTS, Frozen, granularities, make_learner
        >>> from adamerge_jax import materialize, objectives, task_vectors
        >>> from adamerge_jax.data.batches import Batch
        >>> base = {"kernel": jnp.ones((3, 2))}
        >>> experts = [{"kernel": base["kernel"].at[:, c].add(1.0)} for c in range(2)]
        >>> def forward(parameters, heads, inputs):
        ...     logits = inputs["x"] @ materialize(parameters)["kernel"]
        ...     return [objectives.TaskOutputs(own) for own in jnp.split(logits, 2)]
        >>> deltas = task_vectors(base, experts)
        >>> granularity = granularities.tensor(granularities.shapes_of(base, deltas))
        >>> learner = make_learner(
        ...     forward, granularity, CONSTRAINTS["free"], objectives.entropy(), optax.sgd(1.0)
        ... )
        >>> state = learner.init({"kernel": jnp.array([[0.6, 0.4]])})  # [G, K] by group
        >>> weights = jnp.full((2, 4), 1 / 4)  # four examples of each task
        >>> batch = Batch({"x": jnp.ones((8, 3))}, weights, [objectives.Targets()] * 2)
        >>> state, entropies = learner.step(state, Frozen(base, deltas, ()), batch)
        >>> entropies.shape  # [tasks], in nats
        (2,)
        >>> bool(jnp.diff(learner.coefficients(state)["kernel"][0])[0] < -0.2)  # further apart
        True
    """

    def coefficients(raw: Values) -> Values:
        return {group: constraint.apply(array) for group, array in raw.items()}

    def run(raw: Values, frozen: Frozen, batch: Batch) -> Evaluation:
        scales = granularity.scales(coefficients(raw))
        mixed = mix(frozen.base, frozen.deltas, scales)
        outputs = forward(mixed, frozen.heads, batch.inputs)
        if batch.strong_inputs is not None:
            strong = forward(mixed, frozen.heads, batch.strong_inputs)
            pairs = zip(outputs, strong, strict=True)
            outputs = [weak._replace(strong=view.logits) for weak, view in pairs]
        each = [objective] * len(outputs) if isinstance(objective, Objective) else objective
        tasks = [
            _evaluate_task(own, task_outputs, targets, weights)
            for own, weights, task_outputs, targets in zip(
                each, batch.weights, outputs, batch.targets, strict=True
            )
        ]
        per_task, predicted = zip(*tasks, strict=True)
        return Evaluation(jnp.stack(per_task), jnp.stack(predicted))

    def init(values: Values) -> State:
        raw = {
            group: constraint.invert(jnp.asarray(array, jnp.float32))
            for group, array in values.items()
        }
        # Not the given values, which may differ from these by rounding.
        return State(raw, optimizer.init(raw), coefficients(raw))

    compiled = functools.partial(jax.jit, out_shardings=devices.replicated)

    @compiled
    def step(state: State, frozen: Frozen, batch: Batch) -> tuple[State, Float[Array, " tasks"]]:
        def total(raw: Values, part: Batch) -> tuple[Float[Array, ""], Float[Array, " tasks"]]:
            per_task = run(raw, frozen, part).objective
            return per_task.sum(), per_task

        def added(raw: Values) -> Float[Array, ""]:
            found = (w * term(coefficients(raw), state.start) for w, term in regularizers)
            return sum(found, jnp.zeros(()))

        of_part = functools.partial(jax.grad(total, has_aux=True), state.raw)
        if microbatches == 1:
            gradient, per_task = of_part(batch)
        else:

            def add(sums: PyTree, part: Batch) -> tuple[PyTree, None]:
                return jax.tree.map(jnp.add, sums, of_part(part)), None

            parts = split(batch, microbatches)
            first = jax.tree.map(lambda array: array[0], parts)
            zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_part, first))
            gradient, per_task = jax.lax.scan(add, zeros, parts)[0]
        gradient = jax.tree.map(jnp.add, gradient, jax.grad(added)(state.raw))
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.raw)
        raw = optax.apply_updates(state.raw, updates)
        return State(raw, optimizer_state, state.start), per_task

    @compiled
    def evaluate(state: State, frozen: Frozen, batch: Batch) -> Evaluation:
        return run(state.raw, frozen, batch)

    return Learner(init, step, evaluate, lambda state: coefficients(state.raw))


def _evaluate_task(
    objective: Objective, outputs: TaskOutputs, targets: Targets, weights: Float[Array, " B"]
) -> tuple[Float[Array, ""], Int[Array, "B ..."]]:
    """The objective of one task, and the classes predicted."""
    require_given(objective.needs, outputs, targets)

    def evaluate() -> tuple[Array, Array]:
        known = outputs
        if callable(outputs.logits):
            known = outputs._replace(logits=outputs.logits())
        return (weights * objective.value(known, targets)).sum(), known.logits.argmax(-1)

    # Logits that come as a function are those of one task at a time, forwards and backwards.
    return jax.checkpoint(evaluate)() if callable(outputs.logits) else evaluate()


def forward_with_heads(
    backbone: Network,
    heads: Sequence[Network],
    hidden_states: Sequence[int] = (),
    elsewhere: bool = False,
    logits_again: bool = False,
) -> Forward:
    """Runs one backbone on the examples of all tasks in one batch, then each task's own head.

    Args:
        backbone: From parameters and inputs `[tasks * B, ...]` to outputs.
        heads: One per task, from its parameters and the outputs of its B examples to logits.
        hidden_states: Layers whose hidden states the outputs are to hold.
        elsewhere: Whether they are to hold each head's logits on the other tasks' examples.
        logits_again: Whether a task's logits are computed again in the backward pass rather than
            kept: those of a language model are the largest arrays of a step.
    """

    def forward(parameters: PyTree, head_parameters: PyTree, inputs: PyTree) -> list[TaskOutputs]:
        outputs = backbone(parameters, inputs, hidden_states=bool(hidden_states))
        size = len(outputs.last_hidden_state) // len(heads)
        mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
        by_task = []
        for position, (head, own) in enumerate(zip(heads, head_parameters, strict=True)):
            own = complete_head(head, own, parameters)
            chosen = slice(position * size, (position + 1) * size)
            task_outputs = outputs.examples(chosen)
            every = head(own, outputs) if elsewhere else None
            if logits_again:
                logits = functools.partial(head, own, task_outputs)
            else:
                logits = head(own, task_outputs) if every is None else every[chosen]
            by_task.append(
                TaskOutputs(
                    logits,
                    {layer: task_outputs.hidden_states[layer] for layer in hidden_states},
                    None if mask is None else mask[chosen],
                    elsewhere=None if every is None else _without(every, chosen),
                )
            )
        return by_task

    return forward


def _without(rows: Float[Array, "N C"], chosen: slice) -> Float[Array, "M C"]:
    return jnp.concatenate([rows[: chosen.start], rows[chosen.stop :]])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Look:
    """What the held-out calibration data says of some coefficients.

    Attributes:
        objective: Of each task, `[tasks]`.
        agreement: Part of each task's examples (of a language model, of the tokens to predict)
            that get their label, or where there are no labels the class that the expert gives
            them, `[tasks]`; NaN where there is neither.
        commonest: Part of each task's examples that get its commonest class, `[tasks]`.
        examples: Number of each task's examples, or of tokens, `[tasks]`.
    """

    objective: np.ndarray
    agreement: np.ndarray
    commonest: np.ndarray
    examples: np.ndarray

    def collapsed(self, start: "Look") -> np.ndarray:
        """Which tasks' predictions have fallen onto one class since the start, `[tasks]`.

        That is: nearly all examples get one class, which they did not at the start, while the
        objective went down. Under `FEWEST_TO_JUDGE` examples nothing can be said.
        """
        return (
            (self.commonest >= COLLAPSED)
            & (start.commonest < SPREAD)
            & (self.objective < start.objective)
            & (self.examples >= FEWEST_TO_JUDGE)
        )


COLLAPSED = 0.95
"""Part of a task's examples in one class from which on its predictions have collapsed, ..."""

SPREAD = 0.85
"""... if it was under this part at the start."""

FEWEST_TO_JUDGE = 16
"""Held-out examples of a task under which a collapse cannot be told from chance."""

FEWEST_TO_CHOOSE = 32
"""Held-out examples of all tasks under which one good step cannot be told from another."""


class Control(NamedTuple):
    """What must not suffer while something else is forgotten.

    Attributes:
        tasks: Position of each control task; only their predictions are watched for a collapse.
        fraction: Learning stops before the agreement of one of these tasks falls below this part
            of what it was at the start; None for never.
    """

    tasks: tuple[int, ...]
    fraction: float | None

    def allows(self, look: Look, start: Look) -> bool:
        """Whether each control task is still good enough."""
        if self.fraction is None:
            return True
        chosen = list(self.tasks)
        return bool((look.agreement[chosen] >= self.fraction * start.agreement[chosen]).all())


@dataclasses.dataclass(frozen=True)
class Progress:
    """What is known after a step.

    Attributes:
        step: Number of optimizer steps taken.
        per_task: The objective of each task on the step's batch, before the step, `[tasks]`;
            None at step 0.
        held_out: What the held-out data says after the step, or None where this step did not look.
        seconds: Wall-clock time of the step, compilation included where there was one.
        collapsed: Tasks whose predictions fell onto one class, at this look.
        best: The coefficients after this step, if they are the best so far.
    """

    step: int
    per_task: np.ndarray | None
    held_out: Look | None
    seconds: float
    collapsed: tuple[str, ...] = ()
    best: "Learned | None" = None


class Learned(NamedTuple):
    """The coefficients that the held-out calibration data chose.

    Attributes:
        values: Coefficients by group, `[G, K, ...]`.
        step: After how many steps; 0 is the starting point.
        held_out: What the held-out data says of them.

    Examples:
        >>> import numpy as np
        >>> from adamerge_jax import Learned
        >>> from adamerge_jax.learning.learner import Look
        >>> tasks = np.array([0.1, 0.2])
        >>> look = Look(objective=tasks, agreement=tasks, commonest=tasks, examples=tasks)
        >>> learned = Learned({"all": np.array([[0.3, 0.7]])}, step=40, held_out=look)  # [G, K]
        >>> learned.step, learned.values["all"].shape
        (40, (1, 2))
    """

    values: Values
    step: int
    held_out: Look


class Snapshot(NamedTuple):
    """Where learning is: all that is needed to go on as if it had never stopped.

    Attributes:
        state: After `step` steps.
        step: Number of optimizer steps taken.
        start: What the held-out data said of the starting point.
        best: The best coefficients so far.
        ended: Whether there is no step left to take.
    """

    state: State
    step: int
    start: Look
    best: Learned
    ended: bool

    @classmethod
    def like(cls, learner: Learner, initial: Values) -> "Snapshot":
        """One of the same structure as those of a learner, whatever its leaves."""
        look = Look(*np.zeros((4, 1)))
        return cls(learner.init(initial), 0, look, Learned(initial, 0, look), False)


def learn(
    learner: Learner,
    frozen: Frozen,
    initial: Values,
    calibration: Calibration,
    *,
    steps: int,
    evaluate_every: int,
    control: Control | None = None,
    report: Callable[[Progress], Any] = lambda progress: None,
    resume: Snapshot | None = None,
    save: Callable[[Snapshot], Any] = lambda snapshot: None,
    devices: Devices = ONE_DEVICE,
) -> Learned:
    """Runs the steps and keeps the coefficients that do best on the held-out data.

    Where under `FEWEST_TO_CHOOSE` examples are held out, chance would decide which step does best:
    there the last look that is better than the start is kept. Coefficients under which a task's
    predictions have collapsed onto one class are never kept: their objective is low for the wrong
    reason.

    Args:
        learner: How coefficients are learned.
        frozen: Base, deltas and heads.
        initial: The coefficients to start from, `[G, K, ...]` by group.
        calibration: Batches to learn from and to choose by.
        steps: Number of optimizer steps.
        evaluate_every: Steps between two looks at the held-out data; the start and the end are
            always looked at.
        control: What must not suffer, where something is to be forgotten.
        report: Called with each step's `Progress`, and once before the first step.
        resume: Where an earlier call with the same arguments was; its steps are neither taken nor
            reported again.
        save: Called after every look at the held-out data, with what to go on from.
        devices: Those of the learner.

    Returns:
        Never worse on the held-out data than the starting point.

    Raises:
        NonFiniteObjectiveError: Says at which step and on which task; carries the last good
            coefficients.

    Examples:
        The classifier of `make_learner`'s example, from data to the merged parameters:

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> import optax
        >>> from adamerge_jax import CONSTRAINTS, ArrayExamples, Frozen, calibrate, granularities
        >>> from adamerge_jax import learn, make_learner, materialize, mix, objectives, task_vectors
        >>> base = {"kernel": jnp.ones((3, 2))}
        >>> experts = [{"kernel": base["kernel"].at[:, c].add(1.0)} for c in range(2)]
        >>> def forward(parameters, heads, inputs):
        ...     logits = inputs["x"] @ materialize(parameters)["kernel"]
        ...     return [objectives.TaskOutputs(own) for own in jnp.split(logits, 2)]
        >>> deltas = task_vectors(base, experts)
        >>> shapes = granularities.shapes_of(base, deltas)
        >>> granularity = granularities.tensor(shapes)
        >>> initial = granularity.init(granularities.constant(shapes, experts=2, value=0.3))
        >>> learned = learn(
        ...     make_learner(
        ...         forward,
        ...         granularity,
        ...         CONSTRAINTS["clip"],
        ...         objectives.cross_entropy(),
        ...         optax.adam(0.1),
        ...     ),
        ...     Frozen(base, deltas, heads=()),
        ...     initial,
        ...     calibrate(
        ...         {
        ...             task: ArrayExamples({"x": np.ones((10, 3))}, labels=np.zeros(10, int))
        ...             for task in ("one", "other")
        ...         },
        ...         batch_size=4,
        ...         held_out=0.2,
        ...         seed=0,
        ...     ),
        ...     steps=4,
        ...     evaluate_every=2,
        ... )
        >>> print(learned.values["kernel"].round(1))  # [G, K]: all examples are of class 0
        [[0.7 0. ]]
        >>> merged = materialize(mix(base, deltas, granularity.scales(learned.values)))
        >>> merged["kernel"].shape
        (3, 2)
    """
    tasks = list(calibration.examples)
    state = devices.replicate(learner.init(initial) if resume is None else resume.state)
    best = None if resume is None else resume.best

    def require_finite(per_task: np.ndarray, step: int, where: str) -> None:
        for task, value in zip(tasks, per_task, strict=True):
            if not np.isfinite(value):
                raise NonFiniteObjectiveError(
                    f"step {step}, task {task!r}: the objective on {where} is {value}; "
                    "lower the learning rate, or look for extreme values in this expert",
                    best,
                )

    def look(step: int) -> Look:
        seen = _look(learner, state, frozen, calibration, devices)
        require_finite(seen.objective, step, "the held-out data")
        return seen

    def keep(step: int, seen: Look) -> None:
        nonlocal best
        best = Learned(jax.device_get(learner.coefficients(state)), step, seen)

    if resume is None:
        began = time.perf_counter()
        start = look(0)
        keep(0, start)
        report(Progress(0, None, start, time.perf_counter() - began, best=best))
        save(Snapshot(state, 0, start, best, ended=False))
        taken = 0
    else:
        start, taken = resume.start, resume.step
        if resume.ended:
            return best
    batches = calibration.batches(taken)
    for step, batch in zip(range(taken + 1, steps + 1), batches, strict=False):
        began = time.perf_counter()
        state, per_task = learner.step(state, frozen, _spread(batch, devices))
        per_task = np.asarray(per_task)
        seconds = time.perf_counter() - began
        require_finite(per_task, step, "the step's batch")
        if step % evaluate_every and step != steps:
            report(Progress(step, per_task, None, seconds))
            continue
        seen = look(step)
        allowed = control is None or control.allows(seen, start)
        fallen = seen.collapsed(start)
        if control is not None:
            fallen &= np.isin(np.arange(len(tasks)), control.tasks)
        to_beat = best.held_out if seen.examples.sum() >= FEWEST_TO_CHOOSE else start
        is_best = allowed and not fallen.any() and seen.objective.sum() < to_beat.objective.sum()
        if is_best:
            keep(step, seen)
        collapsed = tuple(task for task, gone in zip(tasks, fallen, strict=True) if gone)
        report(Progress(step, per_task, seen, seconds, collapsed, best if is_best else None))
        save(Snapshot(state, step, start, best, ended=step == steps or not allowed))
        if not allowed:
            break
    return best


def _spread(batch: Batch, devices: Devices) -> Batch:
    """Gives every device its examples of a batch."""
    inputs, targets, strong = devices.examples((batch.inputs, batch.targets, batch.strong_inputs))
    return batch._replace(inputs=inputs, targets=targets, strong_inputs=strong)


def _look(
    learner: Learner,
    state: State,
    frozen: Frozen,
    calibration: Calibration,
    devices: Devices,
) -> Look:
    """Evaluates the held-out data, every example once."""
    objective = np.zeros(len(calibration.examples))
    predicted: list[list[np.ndarray]] = [[] for _ in calibration.examples]
    wanted: list[list[np.ndarray]] = [[] for _ in calibration.examples]
    for batch in calibration.held_out_batches():
        evaluation = jax.device_get(learner.evaluate(state, frozen, _spread(batch, devices)))
        objective += evaluation.objective
        for position, (weights, targets) in enumerate(
            zip(batch.weights, batch.targets, strict=True)
        ):
            labels = targets.labels
            counted = weights > 0
            if labels is not None and labels.ndim == 2:
                counted = counted[:, None] & (labels != NOT_PREDICTED)
            predicted[position].append(evaluation.predicted[position][counted])
            if labels is not None:
                wanted[position].append(labels[counted])
            elif targets.expert_logits is not None:
                wanted[position].append(targets.expert_logits.argmax(-1)[counted])
    classes = [np.concatenate(each) for each in predicted]
    agreement = [
        (own == np.concatenate(right)).mean() if right else np.nan
        for own, right in zip(classes, wanted, strict=True)
    ]
    return Look(
        objective,
        np.array(agreement),
        np.array([np.bincount(own).max() / len(own) for own in classes]),
        np.array([len(own) for own in classes]),
    )
