"""Ways of learning against their papers' updates, written plainly in float64, on a tiny classifier.

Three experts of one matrix `[4, 6]`; each task has five examples, and its head is the identity.
"""

import jax.numpy as jnp
import numpy as np
import optax
import torch

from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.granularities import constant, make_granularity
from adamerge_jax.data.batches import Batch
from adamerge_jax.learning.learner import Frozen, make_learner
from adamerge_jax.mixing import materialize
from adamerge_jax.objectives import Targets, TaskOutputs, make_objective
from adamerge_jax.task_vectors import DenseDelta

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
