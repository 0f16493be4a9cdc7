"""bfloat16 weights, task vectors and activations: what is summed is summed in float32."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.granularities import constant, make_granularity
from adamerge_jax.learning import learner as learning
from adamerge_jax.learning.forward import forward_with_heads
from adamerge_jax.learning.optimizer import build_optimizer
from adamerge_jax.recipes.build import build_objectives
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.task_vectors import DenseDelta, LowRankDelta
from tests.references import learning_inputs

BFLOAT16 = ml_dtypes.bfloat16


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(BFLOAT16)


@pytest.mark.parametrize("along", [(1, 1), (64, 1)])
@pytest.mark.parametrize("kind", ["dense", "factors"])
def test_gradients_of_coefficients_are_contracted_in_float32(kind, along):
    """As exact as float32 sums: bfloat16 sums of 64 to 4096 terms would be off by 1e-2."""
    scale = np.random.default_rng(3).normal(size=(3, *along)).astype(np.float32)
    cotangent = draw(2, 64, 64).astype(np.float32)
    if kind == "dense":
        delta = DenseDelta(draw(0, 3, 64, 64))
        exact = np.asarray(delta.values, np.float64)
    else:
        delta = LowRankDelta(draw(0, 3, 64, 2), draw(1, 3, 2, 64))
        exact = np.asarray(delta.left, np.float64) @ np.asarray(delta.right, np.float64)

    @jax.jit
    def gradient(delta, scale, cotangent):
        return jax.vjp(delta.weighted_sum, scale)[1](cotangent)[0]

    found = gradient(jax.device_put(delta), scale, cotangent)
    assert found.dtype == jnp.float32
    axes = (1, 2) if along == (1, 1) else (2,)
    expected = (exact * cotangent).sum(axes, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def objective_and_gradient(
    fields: dict[str, Any], folder: Path, **changes: Any
) -> tuple[np.ndarray, np.ndarray, set]:
    """Of one step at 0.3: the objective by task, what plain descent subtracts, dtypes in use."""
    optimizer = {"name": "sgd", "learning_rate": 1.0}
    recipe = parse_recipe(
        fields | {"learning": {"batch_size": 8, "optimizer": optimizer}} | changes
    )
    inputs = learning_inputs(recipe, folder)
    workspace = inputs.workspace
    granularity = make_granularity("tensor", {}, inputs.shapes)
    learner = learning.make_learner(
        forward_with_heads(workspace.backbone, list(workspace.head_networks.values())),
        granularity,
        CONSTRAINTS["free"],
        list(build_objectives(recipe.objectives, recipe.tasks).values()),
        build_optimizer(recipe.learning.optimizer, 1),
    )
    frozen = learning.Frozen(inputs.base, inputs.deltas, list(workspace.heads.values()))
    start = learner.init(granularity.init(constant(inputs.shapes, inputs.experts, 0.3)))
    after, per_task = learner.step(start, frozen, next(inputs.calibration.batches()))
    assert per_task.dtype == jnp.float32
    moved = [np.ravel(after.raw[name] - start.raw[name]) for name in sorted(start.raw)]
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((inputs.base, inputs.deltas))}
    return np.asarray(per_task), np.concatenate(moved), dtypes


def test_a_step_in_bfloat16_is_near_one_in_float32(image_recipe, tmp_path):
    exact, gradient, dtypes = objective_and_gradient(image_recipe, tmp_path)
    assert dtypes == {np.dtype(np.float32)}
    found, near, dtypes = objective_and_gradient(image_recipe, tmp_path, dtype="bfloat16")
    assert dtypes == {np.dtype(BFLOAT16)}
    # 8 bits of a number: a few tenths of a percent in each of some tens of roundings.
    np.testing.assert_allclose(found, exact, rtol=0.03)
    cosine = near @ gradient / np.linalg.norm(near) / np.linalg.norm(gradient)
    assert cosine > 0.99
