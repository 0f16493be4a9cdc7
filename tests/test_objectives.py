import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from adamerge_jax.objectives import (
    OBJECTIVES,
    Objective,
    Targets,
    TaskOutputs,
    entropy,
    logit_alignment,
    weighted_sum,
)

NO_TARGETS = Targets()


def draw(seed: int, spread: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(6, 5)).astype(np.float32) * spread


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1000.0])
def test_entropy_and_its_gradient(spread):
    reference = torch.tensor(draw(0, spread), requires_grad=True)
    expected = torch.distributions.Categorical(logits=reference).entropy()
    expected.sum().backward()
    logits = jnp.asarray(draw(0, spread))
    values, pull_back = jax.vjp(lambda x: entropy(TaskOutputs(x), NO_TARGETS), logits)
    assert values.shape == (6,)
    np.testing.assert_allclose(values, expected.detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pull_back(jnp.ones(6))[0], reference.grad, rtol=1e-4, atol=1e-6)
    if spread == 0:
        np.testing.assert_allclose(values, np.log(5), rtol=1e-6)


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_logit_alignment_and_its_gradient(spread):
    reference = torch.tensor(draw(0, spread), requires_grad=True)
    expert = torch.tensor(draw(1, spread))
    expected = torch.nn.functional.cross_entropy(reference, expert.softmax(-1), reduction="none")
    expected.sum().backward()
    targets = Targets(jnp.asarray(draw(1, spread)))
    logits = jnp.asarray(draw(0, spread))
    values, pull_back = jax.vjp(lambda x: logit_alignment(TaskOutputs(x), targets), logits)
    assert values.shape == (6,)
    np.testing.assert_allclose(values, expected.detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pull_back(jnp.ones(6))[0], reference.grad, rtol=1e-4, atol=1e-6)


def test_alignment_is_lowest_where_the_expert_is():
    targets = Targets(jnp.asarray(draw(1)))
    at_expert = logit_alignment(TaskOutputs(jnp.asarray(draw(1) + 7.0)), targets)
    np.testing.assert_allclose(
        at_expert, entropy(TaskOutputs(targets.expert_logits), NO_TARGETS), rtol=1e-5
    )
    elsewhere = logit_alignment(TaskOutputs(jnp.asarray(draw(2))), targets)
    assert (elsewhere > at_expert).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_of_half_precision_logits_are_float32(name):
    narrow = jnp.asarray(draw(0), jnp.bfloat16)
    targets = Targets(jnp.asarray(draw(1), jnp.bfloat16))
    values = OBJECTIVES[name].value(TaskOutputs(narrow), targets)
    assert values.dtype == jnp.float32
    wide = Targets(targets.expert_logits.astype(jnp.float32))
    expected = OBJECTIVES[name].value(TaskOutputs(narrow.astype(jnp.float32)), wide)
    np.testing.assert_array_equal(values, expected)


def test_weighted_sum():
    outputs = TaskOutputs(jnp.asarray([[1.0, 2.0], [0.0, 3.0]]))
    first = Objective(lambda outputs, targets: outputs.logits[:, 0])
    objective = weighted_sum([(2.0, OBJECTIVES["entropy"]), (0.5, first)])
    expected = 2 * entropy(outputs, NO_TARGETS) + jnp.array([0.5, 0.0])
    np.testing.assert_allclose(objective.value(outputs, NO_TARGETS), expected)
    assert not objective.needs_expert
    assert weighted_sum([(1.0, first), (0.1, OBJECTIVES["logit_alignment"])]).needs_expert
