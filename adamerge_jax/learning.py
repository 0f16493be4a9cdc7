"""Learning merge coefficients: the compiled step, and the loop around it.

A `Learner` is a set of pure functions, made once from the choices of a recipe. All arrays are
arguments of the compiled functions; none is closed over.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from adamerge_jax.calibration import Batch, Calibration
from adamerge_jax.coefficients import Constraint, Granularity, Values
from adamerge_jax.mixing import mix
from adamerge_jax.models import Network
from adamerge_jax.objectives import Objective, Targets, TaskOutputs
from adamerge_jax.task_vectors import Delta

Forward = Callable[[PyTree, PyTree, PyTree], Sequence[TaskOutputs]]
"""`(parameters, heads, inputs) -> outputs` of each task, from parameters that may be mixtures."""


class Frozen(NamedTuple):
    """The arrays that stay as they are while coefficients are learned.

    Attributes:
        base: Parameters of the base model, any pytree.
        deltas: The experts' deltas by parameter name.
        heads: What each task keeps for itself, any pytree.
    """

    base: PyTree[Array]
    deltas: Mapping[str, Delta]
    heads: PyTree[Array]


class State(NamedTuple):
    """What changes from step to step.

    Attributes:
        raw: Unconstrained arrays, which the constraint turns into coefficients.
        optimizer: The optimizer's own state.
    """

    raw: Values
    optimizer: optax.OptState


class Learner(NamedTuple):
    """How coefficients are learned.

    Attributes:
        init: `coefficients -> State`.
        step: `(state, frozen, batch) -> (State, objective of each task [tasks])`, compiled; the
            objective is that of the state before the step.
        evaluate: `(state, frozen, batch) -> objective of each task [tasks]`, compiled.
        coefficients: `state -> coefficients` by group, `[G, K, ...]`.
    """

    init: Callable[[Values], State]
    step: Callable[[State, Frozen, Batch], tuple[State, Float[Array, " tasks"]]]
    evaluate: Callable[[State, Frozen, Batch], Float[Array, " tasks"]]
    coefficients: Callable[[State], Values]


def make_learner(
    forward: Forward,
    granularity: Granularity,
    constraint: Constraint,
    objective: Objective,
    optimizer: optax.GradientTransformation,
) -> Learner:
    """Puts the choices of a recipe together.

    With `entropy` as the objective this is AdaMerging (Yang et al., ICLR 2024, eq. 7): entropies
    are averaged over each task's examples and summed over tasks. The parameters are mixed once
    for all tasks of a step.

    Args:
        forward: Runs the merged model on the examples of all tasks and applies each task's head.
        granularity: Which parameters share a coefficient.
        constraint: Which values coefficients may take.
        objective: What is minimised.
        optimizer: Any optax transformation.
    """

    def coefficients(raw: Values) -> Values:
        return {group: constraint.apply(array) for group, array in raw.items()}

    def objectives(raw: Values, frozen: Frozen, batch: Batch) -> Float[Array, " tasks"]:
        scales = granularity.scales(coefficients(raw))
        outputs = forward(mix(frozen.base, frozen.deltas, scales), frozen.heads, batch.inputs)
        experts = batch.expert_logits or [None] * len(outputs)
        return jnp.stack(
            [
                (weights * objective.value(task_outputs, Targets(expert_logits))).sum()
                for weights, task_outputs, expert_logits in zip(
                    batch.weights, outputs, experts, strict=True
                )
            ]
        )

    def init(values: Values) -> State:
        raw = {
            group: constraint.invert(jnp.asarray(array, jnp.float32))
            for group, array in values.items()
        }
        return State(raw, optimizer.init(raw))

    @jax.jit
    def step(state: State, frozen: Frozen, batch: Batch) -> tuple[State, Float[Array, " tasks"]]:
        def total(raw: Values) -> tuple[Float[Array, ""], Float[Array, " tasks"]]:
            per_task = objectives(raw, frozen, batch)
            return per_task.sum(), per_task

        gradient, per_task = jax.grad(total, has_aux=True)(state.raw)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.raw)
        return State(optax.apply_updates(state.raw, updates), optimizer_state), per_task

    @jax.jit
    def evaluate(state: State, frozen: Frozen, batch: Batch) -> Float[Array, " tasks"]:
        return objectives(state.raw, frozen, batch)

    return Learner(init, step, evaluate, lambda state: coefficients(state.raw))


def forward_with_heads(trunk: Network, heads: Sequence[Network]) -> Forward:
    """Runs one trunk on the examples of all tasks in one batch, then each task's head on its own.

    Args:
        trunk: From parameters and inputs `[tasks * B, ...]` to outputs.
        heads: One per task, from its parameters and the outputs of its B examples to logits.
    """

    def forward(parameters: PyTree, head_parameters: PyTree, inputs: PyTree) -> list[TaskOutputs]:
        outputs = trunk(parameters, inputs)
        size = outputs.pooled.shape[0] // len(heads)
        logits = [
            head(own, outputs.examples(slice(position * size, (position + 1) * size)))
            for position, (head, own) in enumerate(zip(heads, head_parameters, strict=True))
        ]
        return [TaskOutputs(task_logits) for task_logits in logits]

    return forward


@dataclasses.dataclass(frozen=True)
class Progress:
    """What is known after a step.

    Attributes:
        step: Number of optimizer steps taken.
        per_task: The objective of each task on the step's batch, before the step, `[tasks]`;
            None at step 0.
        held_out: The objective of each task on the held-out data after the step, `[tasks]`, or
            None where this step did not look.
        seconds: Wall-clock time of the step, compilation included where there was one.
    """

    step: int
    per_task: np.ndarray | None
    held_out: np.ndarray | None
    seconds: float


class Learned(NamedTuple):
    """The coefficients that did best on the held-out calibration data.

    Attributes:
        values: Coefficients by group, `[G, K, ...]`.
        step: After how many steps; 0 is the starting point.
        held_out: The objective of each task there, `[tasks]`.
    """

    values: Values
    step: int
    held_out: np.ndarray


class NonFiniteObjectiveError(RuntimeError):
    """The objective stopped being a finite number.

    Attributes:
        learned: The last good coefficients: the best on held-out data up to then.
    """

    def __init__(self, message: str, learned: Learned | None):
        super().__init__(message)
        self.learned = learned


def learn(
    learner: Learner,
    frozen: Frozen,
    initial: Values,
    calibration: Calibration,
    *,
    steps: int,
    evaluate_every: int,
    report: Callable[[Progress], Any] = lambda progress: None,
) -> Learned:
    """Runs the steps and keeps the coefficients that do best on the held-out data.

    Args:
        learner: How coefficients are learned.
        frozen: Base, deltas and heads.
        initial: The coefficients to start from.
        calibration: Batches to learn from and to choose by.
        steps: Number of optimizer steps.
        evaluate_every: Steps between two looks at the held-out data; the start and the end are
            always looked at.
        report: Called with each step's `Progress`, and once before the first step.

    Returns:
        Never worse on the held-out data than the starting point.

    Raises:
        NonFiniteObjectiveError: Says at which step and on which task; carries the last good
            coefficients.
    """
    tasks = list(calibration.examples)
    state = learner.init(initial)
    best: Learned | None = None

    def require_finite(per_task: np.ndarray, step: int, where: str) -> None:
        for task, value in zip(tasks, per_task, strict=True):
            if not np.isfinite(value):
                raise NonFiniteObjectiveError(
                    f"step {step}, task {task!r}: the objective on {where} is {value}; "
                    "lower the learning rate, or look for extreme values in this expert",
                    best,
                )

    def look(step: int) -> np.ndarray:
        nonlocal best
        batches = calibration.held_out_batches()
        per_task = np.sum([learner.evaluate(state, frozen, batch) for batch in batches], axis=0)
        require_finite(per_task, step, "the held-out data")
        if best is None or per_task.sum() < best.held_out.sum():
            best = Learned(jax.device_get(learner.coefficients(state)), step, per_task)
        return per_task

    started = time.perf_counter()
    report(Progress(0, None, look(0), time.perf_counter() - started))
    for step, batch in zip(range(1, steps + 1), calibration.batches(), strict=False):
        started = time.perf_counter()
        state, per_task = learner.step(state, frozen, batch)
        per_task = np.asarray(per_task)
        seconds = time.perf_counter() - started
        require_finite(per_task, step, "the step's batch")
        held_out = look(step) if step % evaluate_every == 0 or step == steps else None
        report(Progress(step, per_task, held_out, seconds))
    assert best is not None
    return best
