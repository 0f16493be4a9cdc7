"""The compiled functions that learning consists of.

A `Learner` is a set of pure functions, made once from the choices of a recipe. All arrays are
arguments of the compiled functions; none is closed over.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from adamerge_jax.coefficients.constraints import Constraint
from adamerge_jax.coefficients.granularities import Granularity, Values
from adamerge_jax.data.batches import Batch
from adamerge_jax.devices import ONE_DEVICE, Devices
from adamerge_jax.heads.learned import HeadLearning, Heads, HeadState, replaced_heads
from adamerge_jax.learning.evaluation import (
    Evaluation,
    evaluate_tasks,
    floors_of,
    with_augmented,
)
from adamerge_jax.learning.forward import Forward
from adamerge_jax.learning.microbatches import sum_over_parts
from adamerge_jax.learning.mixed_once import gradient_mixed_once
from adamerge_jax.learning.on_devices import Share, on_devices
from adamerge_jax.mixing import mix
from adamerge_jax.objectives import Objective, Targets
from adamerge_jax.objectives.regularizers import Regularizer
from adamerge_jax.task_vectors import Delta

Raw = Mapping[str, PyTree[Array]]
"""What is learned by group; `Constraint.apply` turns it into coefficients."""


class Frozen(NamedTuple):
    """The arrays that stay as they are while coefficients are learned.

    Attributes:
        base: Parameters of the base model, any pytree.
        deltas: The experts' deltas by parameter name, as the granularity prepared them.
        heads: Parameters of each task's head, any pytree.

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
    """The arrays that change from step to step.

    Attributes:
        raw: What is learned for each group, an array or a tree of arrays, which the constraint
            turns into coefficients.
        optimizer: The optimizer's own state.
        start: The coefficients that learning started from, for regularizers.
        heads: The parameters of each task's head that are learned, by name; empty where heads are
            kept.
        head_optimizer: The state of their learning; None where they are kept.
    """

    raw: Raw
    optimizer: optax.OptState
    start: Values
    heads: Heads = ()
    head_optimizer: HeadState | None = None


class Learner(NamedTuple):
    """The pure functions that learn coefficients.

    Attributes:
        init: `(coefficients, experts' heads = ()) -> State`; the heads where they are learned.
        step: `(state, frozen, batch) -> (State, objective of each task [tasks])`, compiled; the
            objective is that of the state before the step.
        evaluate: `(state, frozen, batch) -> Evaluation`, compiled.
        coefficients: `state -> coefficients` by group, `[G, K, ...]`.
        floor: `(weights, targets) -> the objective of each task that is perfect [tasks]`, compiled;
            None where that is 0. The step does not know it.

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

    init: Callable[..., State]
    step: Callable[[State, Frozen, Batch], tuple[State, Float[Array, " tasks"]]]
    evaluate: Callable[[State, Frozen, Batch], Evaluation]
    coefficients: Callable[[State], Values]
    floor: Callable[..., Float[Array, " tasks"]] | None = None


def make_learner(
    forward: Forward,
    granularity: Granularity,
    constraint: Constraint,
    objective: Objective | Sequence[Objective],
    optimizer: optax.GradientTransformation,
    regularizers: Sequence[tuple[float, Regularizer]] = (),
    microbatches: int = 1,
    devices: Devices = ONE_DEVICE,
    head_learning: HeadLearning | None = None,
    mixes_once: bool = False,
) -> Learner:
    """Makes the functions that learn coefficients from the choices of a recipe.

    With `entropy` as the objective this is AdaMerging (Yang et al., ICLR 2024, eq. 7): entropies
    are averaged over each task's examples and summed over tasks. The parameters are mixed once
    for all tasks of a step.

    Args:
        forward: Runs the merged model on the examples of all tasks, `[tasks * B, ...]`, and
            applies each task's head: `(parameters, heads, inputs) -> outputs` of each task.
        granularity: Which parameters share a coefficient.
        constraint: Which values coefficients may take.
        objective: The objective of all tasks, or of each.
        optimizer: Any optax transformation.
        regularizers: Terms that are added to the sum over tasks, with their weights.
        microbatches: The number of parts of its batch that a step runs one after the other.
        devices: The devices that it runs on; each has all coefficients and the whole state of the
            optimizer.
        head_learning: The learning of heads beside the coefficients; None where they are kept.
        mixes_once: If True, the parts of a batch share one mix of the weights, see
            `mixed_once.py`; otherwise, and where parameters are split among devices, each mixes its
            own, layer by layer.

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
        ...     return [objectives.TaskOutputs(task_logits) for task_logits in jnp.split(logits, 2)]
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

    def coefficients(raw: Raw) -> Values:
        return {group: constraint.apply(array) for group, array in raw.items()}

    def objectives_of(tasks: int) -> Sequence[Objective]:
        return [objective] * tasks if isinstance(objective, Objective) else objective

    def scales_of(raw: Raw) -> Mapping[str, Array]:
        return granularity.scales(coefficients(raw))

    def run(
        mixed: PyTree, learned_heads: Heads, frozen: Frozen, batch: Batch, share: Share
    ) -> Evaluation:
        heads = replaced_heads(frozen.heads, learned_heads)
        mixed = share.parameters(mixed)
        outputs = forward(mixed, heads, batch.inputs)
        if batch.augmented_inputs is not None:
            augmented = forward(mixed, heads, batch.augmented_inputs)
            pairs = zip(outputs, augmented, strict=True)
            outputs = [with_augmented(plain, other) for plain, other in pairs]
        objectives = share.objectives(objectives_of(len(batch.targets)))
        return evaluate_tasks(objectives, outputs, batch)

    def init(values: Values, heads: Heads = ()) -> State:
        raw = {
            group: constraint.invert(jnp.asarray(array, jnp.float32))
            for group, array in values.items()
        }
        # Not the given values, which may differ from these by rounding.
        state = State(raw, optimizer.init(raw), coefficients(raw))
        if head_learning is None:
            return state
        learned_heads, head_optimizer = head_learning.init(heads)
        return state._replace(heads=learned_heads, head_optimizer=head_optimizer)

    compiled = partial(jax.jit, out_shardings=devices.replicated)

    def gradient_of_share(
        learned: tuple[Raw, Heads], frozen: Frozen, batch: Batch, share: Share
    ) -> tuple[tuple[tuple[Raw, Heads], Float[Array, " tasks"]], tuple[()]]:
        """Returns the gradient of a device's examples by what is learned, and their objectives."""
        raw, heads = learned
        parts = share.parts(microbatches, batch)

        def total(
            mixed: PyTree, heads: Heads, part: Batch
        ) -> tuple[Float[Array, ""], Float[Array, " tasks"]]:
            per_task = run(mixed, heads, frozen, part, share).objective
            return per_task.sum(), per_task

        def mixed_and_total(
            learned: tuple[Raw, Heads], part: Batch
        ) -> tuple[Float[Array, ""], Float[Array, " tasks"]]:
            raw, heads = learned
            return total(mix(frozen.base, frozen.deltas, scales_of(raw)), heads, part)

        if not mixes_once or parts == 1 or share.axes:  # what is split is gathered in every part
            gradient_of = partial(jax.grad(mixed_and_total, has_aux=True), learned)
            return sum_over_parts(gradient_of, batch, parts), ()
        scales, gradient_by_raw = jax.vjp(scales_of, raw)
        (scale_gradients, head_gradient), per_task = gradient_mixed_once(
            total, frozen.base, frozen.deltas, scales, heads, batch, parts
        )
        # A granularity may have scales of parameters that no expert changed.
        zeros = jax.tree.map(jnp.zeros_like, dict(scales))
        (gradient,) = gradient_by_raw(zeros | dict(scale_gradients))
        return ((gradient, head_gradient), per_task), ()

    def evaluate_share(
        learned: tuple[Raw, Heads], frozen: Frozen, batch: Batch, share: Share
    ) -> tuple[Float[Array, " tasks"], Sequence[Array]]:
        """Returns the objectives of a device's examples, and the classes predicted."""
        raw, heads = learned
        mixed = mix(frozen.base, frozen.deltas, scales_of(raw))
        return tuple(run(mixed, heads, frozen, batch, share))

    gradient_of_batch = on_devices(gradient_of_share, devices)
    evaluate_batch = on_devices(evaluate_share, devices)

    @compiled
    def step(state: State, frozen: Frozen, batch: Batch) -> tuple[State, Float[Array, " tasks"]]:
        def regularization(raw: Raw) -> Float[Array, ""]:
            terms = (w * term(coefficients(raw), state.start) for w, term in regularizers)
            return sum(terms, jnp.zeros(()))

        of_batch, _ = gradient_of_batch((state.raw, state.heads), frozen, batch)
        (gradient, head_gradient), per_task = of_batch
        gradient = jax.tree.map(jnp.add, gradient, jax.grad(regularization)(state.raw))
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.raw)
        moved = optax.apply_updates(state.raw, updates)
        raw = {group: constraint.project(array) for group, array in moved.items()}
        state = state._replace(raw=raw, optimizer=optimizer_state)
        if head_learning is not None:
            heads, head_optimizer = head_learning.update(
                state.heads, head_gradient, state.head_optimizer, frozen.heads
            )
            state = state._replace(heads=heads, head_optimizer=head_optimizer)
        return state, per_task

    @compiled
    def evaluate(state: State, frozen: Frozen, batch: Batch) -> Evaluation:
        return Evaluation(*evaluate_batch((state.raw, state.heads), frozen, batch))

    @compiled
    def floor(
        weights: Float[Array, "tasks B"], targets: Sequence[Targets]
    ) -> Float[Array, " tasks"]:
        return floors_of(objectives_of(len(targets)), weights, targets)

    has_floor = any(of_task.floor is not None for of_task in objectives_of(1))
    return Learner(
        init,
        step,
        evaluate,
        lambda state: coefficients(state.raw),
        floor if has_floor else None,
    )
