import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from adamerge_jax.objectives import TaskOutputs, entropy, weighted_sum


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1000.0])
def test_entropy_and_its_gradient(spread):
    logits = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32) * spread
    reference = torch.tensor(logits, requires_grad=True)
    expected = torch.distributions.Categorical(logits=reference).entropy()
    expected.sum().backward()
    values, pull_back = jax.vjp(lambda x: entropy(TaskOutputs(x)), jnp.asarray(logits))
    assert values.shape == (6,)
    np.testing.assert_allclose(values, expected.detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pull_back(jnp.ones(6))[0], reference.grad, rtol=1e-4, atol=1e-6)
    if spread == 0:
        np.testing.assert_allclose(values, np.log(5), rtol=1e-6)


def test_entropy_of_half_precision_logits_is_float32():
    logits = np.random.default_rng(0).normal(size=(4, 300))
    narrow = jnp.asarray(logits, jnp.bfloat16)
    values = entropy(TaskOutputs(narrow))
    assert values.dtype == jnp.float32
    wide = torch.tensor(np.asarray(narrow, np.float64))
    expected = torch.distributions.Categorical(logits=wide).entropy()
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_weighted_sum():
    outputs = TaskOutputs(jnp.asarray([[1.0, 2.0], [0.0, 3.0]]))
    objective = weighted_sum([(2.0, entropy), (0.5, lambda outputs: outputs.logits[:, 0])])
    np.testing.assert_allclose(objective(outputs), 2 * entropy(outputs) + jnp.array([0.5, 0.0]))
