"""Activation functions beside those that `transformers` has by the same names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

from adamerge_jax.models.layers import ACTIVATIONS

# None at 0, where the gradient of relu is a matter of convention.
VALUES = np.linspace(-12, 12, 1000, dtype=np.float32)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_gradients(name):
    inputs = torch.from_numpy(VALUES).double().requires_grad_()
    expected = ACT2FN[name](inputs)
    (slope,) = torch.autograd.grad(expected.sum(), inputs)
    found, gradient = jax.vjp(ACTIVATIONS[name], VALUES)
    # Float32 against float64, up to a value of 144: a few units in the last place. The gradient of
    # a tanh next to 1 is a small difference of large numbers, times a value.
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(gradient(jnp.ones_like(found))[0], slope, rtol=1e-5, atol=2e-5)


def test_gelu_of_bfloat16_is_rounded_once():
    narrow = jnp.asarray(VALUES, jnp.bfloat16)
    found = ACTIVATIONS["gelu"](narrow)
    assert found.dtype == jnp.bfloat16
    wide = ACTIVATIONS["gelu"](narrow.astype(jnp.float32))
    np.testing.assert_array_equal(found, wide.astype(jnp.bfloat16))
