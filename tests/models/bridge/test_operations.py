"""Operations that the bridge replaces, against PyTorch's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from adamerge_jax.models.bridge.operations import solve_triangular


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("unitriangular", [False, True])
def test_triangular_systems_and_their_gradients_are_pytorchs(upper, left, unitriangular):
    generator = np.random.default_rng(0)
    matrix = (0.3 * generator.normal(size=(3, 1, 6, 6)) + 2 * np.eye(6)).astype(np.float32)
    right = generator.normal(size=(2, 6, 4) if left else (2, 4, 6)).astype(np.float32)
    weights = generator.normal(size=(3, *right.shape)).astype(np.float32)
    options = {"upper": upper, "left": left, "unitriangular": unitriangular}

    leaves = [torch.tensor(array, requires_grad=True) for array in (matrix, right)]
    expected = torch.linalg.solve_triangular(*leaves, **options)
    (expected * torch.tensor(weights)).sum().backward()

    def total(matrix, right):
        solution = solve_triangular(matrix, right, **options)
        return (solution * weights).sum(), solution

    compute = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    gradients, solution = compute(jnp.asarray(matrix), jnp.asarray(right))
    np.testing.assert_allclose(solution, expected.detach(), atol=1e-5)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(gradient, leaf.grad, atol=1e-5)
