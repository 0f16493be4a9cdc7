"""Task vectors, and sums over experts under `jit`, against NumPy in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adamerge_jax.errors import InputError
from adamerge_jax.task_vectors import DenseDelta, task_vectors

# Float32 sums of up to 8 terms of the order of 1: a few units in the last place.
TOLERANCE = dict(rtol=1e-6, atol=1e-6)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@jax.jit
def weighted_sum(values: jax.Array, scale: jax.Array) -> jax.Array:
    return DenseDelta(values).weighted_sum(scale)


@jax.jit
def gradient(values: jax.Array, scale: jax.Array, cotangent: jax.Array) -> jax.Array:
    return jax.grad(lambda s: jnp.vdot(DenseDelta(values).weighted_sum(s), cotangent))(scale)


@st.composite
def shapes_and_scales(draw) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of K deltas of rank 0 to 4, and of a scale that varies along some of their axes."""
    shape = draw(st.lists(st.integers(1, 4), max_size=4))
    varies = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    experts = draw(st.integers(1, 4))
    along = [size if vary else 1 for size, vary in zip(shape, varies, strict=True)]
    return (experts, *shape), (experts, *along)


@settings(max_examples=30)
@given(shapes_and_scales())
def test_weighted_sum_and_its_gradient(shapes):
    values, scale = draw(0, *shapes[0]), draw(1, *shapes[1])
    expected = (scale.astype(np.float64) * values).sum(0)
    result = weighted_sum(values, scale)
    assert result.shape == shapes[0][1:]
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, **TOLERANCE)

    cotangent = draw(2, *shapes[0][1:])
    summed = tuple(
        axis
        for axis, (of_value, of_scale) in enumerate(zip(*shapes, strict=True))
        if of_scale != of_value
    )
    expected = (cotangent.astype(np.float64) * values).sum(summed, keepdims=True)
    # The sum behind a gradient has up to 4^4 terms.
    np.testing.assert_allclose(gradient(values, scale, cotangent), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale_shape", [(5, 1, 1), (5, 384, 1), (5, 1, 384)])
def test_large_stacked_deltas(scale_shape):
    # The size at which JAX 0.10.2 goes wrong on CPU when an array is closed over.
    values, scales = draw(0, 6, 5, 384, 384), draw(1, 6, *scale_shape)
    result = jax.jit(jax.vmap(lambda v, s: DenseDelta(v).weighted_sum(s)))(values, scales)
    expected = np.stack(
        [(s.astype(np.float64) * v).sum(0) for v, s in zip(values, scales, strict=True)]
    )
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=5e-6)


def test_sums_of_bfloat16_deltas_are_float32():
    values = draw(0, 3, 4, 5).astype(ml_dtypes.bfloat16)
    scale = draw(1, 3, 1, 1)
    result = weighted_sum(values, scale)
    assert result.dtype == jnp.float32
    expected = (scale.astype(np.float64) * values.astype(np.float64)).sum(0)
    np.testing.assert_allclose(result, expected, **TOLERANCE)


@pytest.mark.parametrize("index", [[3], [0, 0, 2], [[1, 3], [0, 1]]])
def test_rows(index):
    values = draw(0, 2, 4, 5)
    rows = DenseDelta(values).rows(np.array(index))
    np.testing.assert_array_equal(rows.values, values[:, np.array(index)])


def test_a_scale_that_does_not_broadcast_is_refused():
    with pytest.raises(ValueError, match=r"scale \(2, 3\) does not broadcast .* \(2, 4\)"):
        DenseDelta(draw(0, 2, 4)).weighted_sum(draw(1, 2, 3))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_task_vectors(dtype):
    base = {
        "embedding": draw(0, 7, 3).astype(dtype),
        "layer": {"*": {"weight": draw(1, 4, 3, 2).astype(dtype)}},
        "scale": np.asarray(1.5, dtype),
        "same": draw(2, 3).astype(dtype),
    }
    experts = [jax.tree.map(lambda leaf: (leaf * 2).astype(dtype), base) for _ in range(2)]
    experts[1]["embedding"] = (base["embedding"] * 0.5).astype(dtype)
    for expert in experts:
        expert["same"] = base["same"]
    deltas = task_vectors(base, experts)
    assert deltas.keys() == {"embedding", "layer.*.weight", "scale"}
    assert {delta.values.dtype for delta in deltas.values()} == {np.dtype(dtype)}
    embedding = base["embedding"].astype(np.float32)
    np.testing.assert_array_equal(
        deltas["embedding"].values.astype(np.float32), [embedding, -embedding / 2]
    )
    weight = base["layer"]["*"]["weight"]
    assert deltas["layer.*.weight"].values.shape == (4, 2, 3, 2)
    np.testing.assert_array_equal(deltas["layer.*.weight"].values[:, 1], weight)
    np.testing.assert_array_equal(deltas["scale"].values.astype(np.float32), [1.5, 1.5])


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        ({"a": np.zeros(2)}, "expert 1: parameter 'b' is only in the base"),
        (
            {"a": np.zeros(2), "b": np.zeros(3), "c": np.zeros(1)},
            "expert 1: parameter 'c' is only in the expert 1",
        ),
        (
            {"a": np.zeros(2), "b": np.zeros((3, 1))},
            r"expert 1: parameter 'b' has shape \(3, 1\), the base has \(3,\)",
        ),
    ],
)
def test_experts_that_do_not_fit(expert, message):
    base = {"a": np.zeros(2), "b": np.zeros(3)}
    with pytest.raises(InputError, match=message):
        task_vectors(base, [base, expert])
