"""Ways of learning against their papers' updates, written plainly in float64, on a tiny classifier.

Three experts of one matrix `[4, 6]`; each task has five examples, and its head is the identity.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.granularities import constant, make_granularity
from adamerge_jax.data.batches import Batch
from adamerge_jax.learning.concrete import concrete
from adamerge_jax.learning.frank_wolfe import frank_wolfe
from adamerge_jax.learning.learner import Frozen, make_learner
from adamerge_jax.learning.schedules import harmonic
from adamerge_jax.mixing import materialize
from adamerge_jax.objectives import Targets, TaskOutputs, make_objective
from adamerge_jax.task_vectors import DenseDelta
from adamerge_jax.task_vectors.offload.memory import make_memory

EXPERTS, EXAMPLES, STEPS = 3, 5, 8
NAME = "dense.weight"
SHAPES = {NAME: (4, 6)}


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


BASE, DELTA = draw(0, 4, 6), draw(1, EXPERTS, 4, 6)
INPUTS = draw(2, EXPERTS * EXAMPLES, 6)
LABELS = np.random.default_rng(3).integers(0, 4, (EXPERTS, EXAMPLES))


def forward(parameters, heads, inputs) -> list[TaskOutputs]:
    logits = inputs["x"] @ materialize(parameters)[NAME].T
    return [TaskOutputs(of_task) for of_task in jnp.split(logits, EXPERTS)]


def set_up(granularity: str, constraint: str, objective: str, optimizer, initial: float):
    """The learner, its frozen arrays, its batch and the state that it starts from."""
    made = make_granularity(granularity, {}, SHAPES)
    learner = make_learner(
        forward, made, CONSTRAINTS[constraint], make_objective(objective, {}), optimizer
    )
    prepared = {NAME: made.prepare(NAME, DenseDelta(jnp.asarray(DELTA)))}
    weights = np.full((EXPERTS, EXAMPLES), 1 / EXAMPLES, np.float32)
    batch = Batch({"x": INPUTS}, weights, [Targets(labels=labels) for labels in LABELS])
    state = learner.init(made.init(constant(SHAPES, EXPERTS, initial)))
    return learner, Frozen({NAME: jnp.asarray(BASE)}, prepared, ()), batch, state


def loss_of(weight: torch.Tensor, objective: str) -> torch.Tensor:
    """The sum over tasks of the mean over their examples."""
    logits = torch.from_numpy(INPUTS).double() @ weight.T
    if objective == "entropy":
        values = torch.distributions.Categorical(logits=logits).entropy()
    else:
        labels = torch.from_numpy(LABELS.reshape(-1))
        values = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return values.reshape(EXPERTS, EXAMPLES).mean(1).sum()


def test_adarank():
    """Directions go and come back: at this learning rate logits cross 0 within a few steps."""
    learner, frozen, batch, state = set_up("singular", "binary", "entropy", optax.adam(0.05), 0.3)
    base, delta = (torch.from_numpy(a).double() for a in (BASE, DELTA))
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    scale = torch.full((EXPERTS,), 0.3).double().requires_grad_()
    logits = torch.full((EXPERTS, 4), 0.1).double().requires_grad_()
    optimizer = torch.optim.Adam([scale, logits], lr=0.05)
    masks = set()
    for _ in range(STEPS):
        mask = (logits / 10).sigmoid()
        singular_values = mask * s + (((mask > 0.5).double() - mask) * s).detach()
        merged = base + torch.einsum("k,kmr,kr,krn->mn", scale, u, singular_values, v)
        optimizer.zero_grad()
        loss_of(merged, "entropy").backward()
        optimizer.step()
        masks.add(tuple((logits > 0).flatten().tolist()))
        state, _ = learner.step(state, frozen, batch)
        np.testing.assert_allclose(state.raw[NAME]["scale"][0], scale.detach(), atol=1e-5)
        np.testing.assert_allclose(state.raw[NAME]["logits"][0], logits.detach(), atol=1e-5)
    assert len(masks) > 2


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize(
    ("granularity", "objective"), [("task", "cross_entropy"), ("row", "entropy")]
)
def test_fw_merging(granularity, objective, with_base):
    """Steps in the space of weights: inner products with whole models, then a way towards one."""
    constraint, start = ("simplex_with_base", 0.0) if with_base else ("simplex", 1 / EXPERTS)
    optimizer = frank_wolfe(harmonic(0.7), base=with_base)
    learner, frozen, batch, state = set_up(granularity, constraint, objective, optimizer, start)
    base, delta = (torch.from_numpy(a).double() for a in (BASE, DELTA))
    models = torch.cat([base[None], base + delta]) if with_base else base + delta
    weight, chosen = base + start * delta.sum(0), set()
    for step in range(STEPS):
        weight = weight.detach().requires_grad_()
        loss_of(weight, objective).backward()
        products = models * weight.grad
        # Of all weights together, or of each row.
        products = products.sum((1, 2)) if granularity == "task" else products.sum(2)
        nearest = products.argmin(0)
        chosen |= set(nearest.flatten().tolist())
        vertex = models[nearest]
        if granularity == "row":
            vertex = torch.stack([models[k, row] for row, k in enumerate(nearest)])
        gamma = 0.7 * 2 / (step + 2)
        weight = (1 - gamma) * weight + gamma * vertex
        state, _ = learner.step(state, frozen, batch)
        values = np.asarray(learner.coefficients(state)["all" if granularity == "task" else NAME])
        assert CONSTRAINTS[constraint].allows(values[0].reshape(EXPERTS, -1)[:, 0])
        by_entry = values[0].reshape(EXPERTS, -1, 1).astype(np.float64)
        merged = BASE + (by_entry * DELTA).sum(0)
        np.testing.assert_allclose(merged, weight.detach(), atol=1e-5)
    assert len(chosen) > 1


def test_a_pool_of_30_experts_takes_the_memory_of_two():
    """What the compiled step of FW-Merging is given and needs, with the same examples."""

    def taken(experts: int) -> int:
        shapes, memory = {NAME: (64, 256)}, make_memory("disk")
        made = make_granularity("task", {}, shapes)
        entries = memory.empty((experts, 64, 256), np.dtype(np.float32))
        for k, row in enumerate(entries):
            row[...] = draw(k, 64, 256)
        delta = memory.keep(NAME, DenseDelta(entries))
        learner = make_learner(
            forward,
            made,
            CONSTRAINTS["simplex_with_base"],
            make_objective("entropy", {}),
            frank_wolfe(harmonic(1.0)),
        )
        frozen = Frozen({NAME: jnp.asarray(draw(0, 64, 256))}, {NAME: delta}, ())
        weights = np.full((EXPERTS, EXAMPLES), 1 / EXAMPLES, np.float32)
        inputs = {"x": draw(2, EXPERTS * EXAMPLES, 256)}
        batch = Batch(inputs, weights, [Targets()] * EXPERTS)
        state = learner.init(made.init(constant(shapes, experts, 0.0)))
        compiled = learner.step.lower(state, frozen, batch).compile().memory_analysis()
        return compiled.argument_size_in_bytes + compiled.temp_size_in_bytes

    assert taken(30) <= taken(2) + 4096 < 6 * 64 * 256 * 4


def test_concrete():
    """Three iterations for the mask, then two steps of AdaMerging under the last one."""
    optimizer = concrete(
        0.01, mask_learning_rate=0.1, inner_learning_rate=0.5, mask_steps=6, seed=7
    )
    learner, frozen, batch, state = set_up("entry", "concrete", "entropy", optimizer, 0.3)
    base, delta = (torch.from_numpy(a).double() for a in (BASE, DELTA))

    def loss(scale, logits):
        mask = (logits / 0.5).sigmoid()
        merged = base + torch.einsum("k,kmn,mn->mn", scale, delta, mask / mask.mean())
        return loss_of(merged, "entropy")

    first = torch.full((EXPERTS,), 0.3).double()
    logits = torch.zeros(4, 6).double().requires_grad_()
    of_mask = torch.optim.Adam([logits], lr=0.1)
    noise = torch.zeros(4, 6).double()
    for iteration in range(3):
        scale = first.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(scale, (logits + noise).detach()), scale)
        adapted = first - 0.5 * gradient
        of_mask.zero_grad()
        loss(adapted, logits + noise).backward()
        of_mask.step()
        # Logistic noise as the package draws it: the second step of an iteration, its one mask.
        key = jax.random.fold_in(jax.random.key(7), 2 * iteration + 1)
        drawn = jax.random.logistic(jax.random.fold_in(key, 0), (1, 24))
        noise = torch.from_numpy(np.array(drawn, np.float64).reshape(4, 6))
        for _ in range(2):
            state, _ = learner.step(state, frozen, batch)
        own = state.raw[NAME]
        expected = (logits + noise).detach().reshape(-1)
        np.testing.assert_allclose(own["logits"][0], expected, atol=1e-5)
        np.testing.assert_allclose(own["scale"][0], first, atol=1e-6)
    scale = first.clone().requires_grad_()
    of_coefficients = torch.optim.Adam([scale], lr=0.01)
    mask = (logits + noise).detach()
    for _ in range(2):
        of_coefficients.zero_grad()
        loss(scale, mask).backward()
        of_coefficients.step()
        state, _ = learner.step(state, frozen, batch)
        np.testing.assert_allclose(state.raw[NAME]["scale"][0], scale.detach(), atol=1e-5)
        np.testing.assert_allclose(state.raw[NAME]["logits"][0], mask.reshape(-1), atol=1e-5)
    soft = (mask / 0.5).sigmoid().reshape(-1)
    expected = torch.outer(scale.detach(), soft / soft.mean())
    np.testing.assert_allclose(learner.coefficients(state)[NAME][0], expected, atol=1e-5)
