"""Heads that are learned with the coefficients, against the same updates in PyTorch."""

import jax.numpy as jnp
import numpy as np
import optax
import torch

from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.granularities import constant, shapes_of, tensor
from adamerge_jax.data.batches import Batch
from adamerge_jax.heads.learned import HeadLearning
from adamerge_jax.learning.learner import Frozen, make_learner
from adamerge_jax.mixing import materialize
from adamerge_jax.objectives import Targets, TaskOutputs, logit_alignment
from adamerge_jax.task_vectors import task_vectors

EXAMPLES, FEATURES, CLASSES, STEPS, RIDGE, RATE = 8, 4, 3, 3, 0.5, 0.1


def test_coefficients_and_heads_take_the_steps_of_a_plain_loop():
    generator = np.random.default_rng(0)
    base = {"kernel": generator.normal(size=(FEATURES, FEATURES)).astype(np.float32)}
    experts = [
        {"kernel": base["kernel"] + 0.5 * generator.normal(size=(FEATURES, FEATURES))}
        for _ in range(2)
    ]
    heads = [
        {"weight": generator.normal(size=(CLASSES, FEATURES)), "bias": np.zeros(CLASSES)}
        for _ in range(2)
    ]
    heads = [{name: np.float32(array) for name, array in head.items()} for head in heads]
    x = generator.normal(size=(2 * EXAMPLES, FEATURES)).astype(np.float32)
    expert_logits = generator.normal(size=(2, EXAMPLES, CLASSES)).astype(np.float32)

    def forward(parameters, head_parameters, inputs):
        features = inputs["x"] @ materialize(parameters)["kernel"]
        return [
            TaskOutputs(part @ head["weight"].T + head["bias"])
            for part, head in zip(jnp.split(features, 2), head_parameters, strict=True)
        ]

    deltas = task_vectors(base, experts)
    granularity = tensor(shapes_of(base, deltas))
    learner = make_learner(
        forward,
        granularity,
        CONSTRAINTS["free"],
        logit_alignment(),
        optax.adam(RATE),
        head_learning=HeadLearning(("weight", "bias"), optax.adam(RATE), RIDGE),
    )
    weights = np.full((2, EXAMPLES), 1 / EXAMPLES, np.float32)
    batch = Batch({"x": x}, weights, [Targets(expert_logits=part) for part in expert_logits])
    initial = granularity.init(constant(shapes_of(base, deltas), 2, 0.3))
    state = learner.init(initial, heads)
    for _ in range(STEPS):
        state, _ = learner.step(state, Frozen(base, deltas, heads), batch)

    scale = torch.tensor([0.3, 0.3], dtype=torch.float64, requires_grad=True)
    wide = [{name: torch.tensor(np.float64(a)) for name, a in head.items()} for head in heads]
    sizes = [
        torch.cat([array.flatten() for array in head.values()]).square().mean().sqrt()
        for head in wide
    ]
    # An update times the size of the head is the update of a head in units of that size.
    moves = [
        {name: torch.zeros_like(array, requires_grad=True) for name, array in head.items()}
        for head in wide
    ]
    leaves = [scale, *(move for head in moves for move in head.values())]
    optimizer = torch.optim.Adam(leaves, lr=RATE, eps=1e-8)
    kernel = torch.tensor(np.float64(base["kernel"]))
    taus = torch.stack([torch.tensor(np.float64(e["kernel"])) - kernel for e in experts])
    for _ in range(STEPS):
        merged = kernel + torch.einsum("k,kij->ij", scale, taus)
        loss = torch.zeros((), dtype=torch.float64)
        for task in range(2):
            head = {n: wide[task][n] + sizes[task] * moves[task][n] for n in wide[task]}
            part = torch.tensor(np.float64(x[task * EXAMPLES : (task + 1) * EXAMPLES]))
            logits = part @ merged @ head["weight"].T + head["bias"]
            targets = torch.tensor(np.float64(expert_logits[task])).softmax(-1)
            loss = loss - (targets * logits.log_softmax(-1)).sum(-1).mean()
            entries = torch.cat([move.flatten() for move in moves[task].values()])
            loss = loss + RIDGE * entries.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    np.testing.assert_allclose(
        np.ravel(learner.coefficients(state)["kernel"]), scale.detach().numpy(), atol=1e-5
    )
    for head, move, wide_head, size in zip(state.heads, moves, wide, sizes, strict=True):
        for name, array in head.items():
            expected = wide_head[name] + size * move[name].detach()
            np.testing.assert_allclose(array, expected.numpy(), atol=1e-5)
