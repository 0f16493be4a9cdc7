"""Task vectors of 8 and 4 bits against float64, and against the error that a step allows."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from adamerge_jax.errors import InputError
from adamerge_jax.task_vectors import QuantizedDelta
from adamerge_jax.task_vectors.quantized import QuantizedEntries, quantize

EXPERTS = 3

# Float32 sums of three terms of the order of 1; gradients of 30.
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


INT8, INT4 = np.dtype(np.int8), np.dtype(ml_dtypes.int4)


def filled(values: np.ndarray, dtype: np.dtype = INT8) -> QuantizedDelta:
    """Deltas `[K, *shape]`, written expert by expert as the loader does it."""
    shape = QuantizedEntries.steps_shape(values.shape[1:], dtype)
    entries = QuantizedEntries(
        np.empty(values.shape, dtype), np.empty((len(values), *shape), np.float32)
    )
    for row, delta in zip(entries, values, strict=True):
        row[...] = delta
    return QuantizedDelta(entries.values, entries.steps)


def restored(delta: QuantizedDelta) -> np.ndarray:
    values, steps = np.asarray(delta.values, np.float64), np.asarray(delta.steps, np.float64)
    if steps.shape[-1] > 1:
        steps = np.repeat(steps, values.shape[-1] // steps.shape[-1], axis=-1)
    return values * steps


@pytest.mark.parametrize("shape", [(7,), (6, 5), (4, 3, 2, 2)])
def test_off_by_half_a_step_at_most(shape):
    # Rows of unlike size, one of them all 0.
    sizes = np.logspace(-4, 2, shape[0], dtype=np.float32).reshape(-1, *(1 for _ in shape[1:]))
    values = draw(0, EXPERTS, *shape) * sizes
    values[1] = 0
    delta = filled(values)
    steps = np.asarray(delta.steps)
    assert np.all(np.abs(restored(delta) - values) <= steps * (0.5 + 1e-4))
    # No step is larger than it must be: the largest entry of each is the largest integer.
    axes = tuple(range(2, values.ndim)) or (1,)
    largest = np.abs(delta.values.astype(int)).max(axes)
    np.testing.assert_array_equal(largest[[0, 2]], 127)
    np.testing.assert_array_equal(restored(delta)[1], 0)


def test_steps_are_per_row_and_per_vector():
    assert filled(draw(0, EXPERTS, 6, 5)).steps.shape == (EXPERTS, 6, 1)
    assert filled(draw(0, EXPERTS, 6, 5, 2)).steps.shape == (EXPERTS, 6, 1, 1)
    assert filled(draw(0, EXPERTS, 6)).steps.shape == (EXPERTS, 1)


def test_four_bits_have_a_step_for_64_entries():
    # Groups of unlike size, one of them all 0.
    values = draw(0, EXPERTS, 6, 128) * np.repeat([1.0, 1e-4], 64)
    values[1, 2] = 0
    delta = filled(values, INT4)
    assert delta.values.dtype == INT4 and delta.steps.shape == (EXPERTS, 6, 2)
    steps = np.repeat(np.asarray(delta.steps), 64, axis=-1)
    assert np.all(np.abs(restored(delta) - values) <= steps * (0.5 + 1e-4))
    largest = np.abs(delta.values.astype(int)).reshape(EXPERTS, 6, 2, 64).max(-1)
    np.testing.assert_array_equal(largest, np.where(delta.steps > 0, 7, 0))
    # Rows that are no multiple of 64 have one step each, as those of more axes do.
    assert filled(draw(0, EXPERTS, 6, 65), INT4).steps.shape == (EXPERTS, 6, 1)
    assert filled(draw(0, EXPERTS, 6, 8, 64), INT4).steps.shape == (EXPERTS, 6, 1, 1)


@pytest.mark.parametrize(
    ("along", "shape", "dtype"),
    [
        *(((1, 1), (6, 5), INT8), ((6, 1), (6, 5), INT8), ((1, 5), (6, 5), INT8)),
        *(((6, 1), (6, 128), INT4), ((1, 128), (6, 128), INT4), ((6, 1), (6, 5), INT4)),
    ],
)
def test_sums_and_gradients(along, shape, dtype):
    delta, scale, cotangent = (
        filled(draw(0, EXPERTS, *shape), dtype),
        draw(1, EXPERTS, *along),
        draw(2, *shape),
    )

    @jax.jit
    def run(delta, scale):
        summed, transposed = jax.vjp(delta.weighted_sum, scale)
        return summed, transposed(cotangent)[0]

    summed, gradient = run(delta, scale)
    assert summed.dtype == gradient.dtype == jnp.float32
    exact = restored(delta)
    np.testing.assert_allclose(summed, (scale * exact).sum(0), **TOLERANCE)
    axes = tuple(1 + axis for axis in range(2) if along[axis] == 1)
    expected = (cotangent * exact).sum(axes, keepdims=True)
    np.testing.assert_allclose(gradient, expected, **TOLERANCE)


@pytest.mark.parametrize("along", [(1, 1), (128, 1), (1, 128)])
def test_no_delta_exists_as_floating_point(along):
    """Forwards and backwards together take less than one expert's delta for each expert."""
    experts, size = 16, 128
    delta, scale = filled(draw(0, experts, size, size)), draw(1, experts, *along)
    cotangent = draw(2, size, size)

    @jax.jit
    def run(delta, scale, cotangent):
        summed, transposed = jax.vjp(delta.weighted_sum, scale)
        return summed, transposed(cotangent)[0]

    temporary = run.lower(delta, scale, cotangent).compile().memory_analysis().temp_size_in_bytes
    assert temporary < experts * size * size * 4 / 4


@pytest.mark.parametrize(("shape", "dtype"), [((6, 5), INT8), ((6, 128), INT4)])
def test_norms(shape, dtype):
    delta = filled(draw(0, EXPERTS, *shape), dtype)
    expected = np.linalg.norm(restored(delta).reshape(EXPERTS, -1), axis=-1)
    np.testing.assert_allclose(delta.norms(stacked=False), expected, rtol=1e-6)


@pytest.mark.parametrize(("shape", "dtype"), [((6, 5), INT8), ((6,), INT8), ((6, 128), INT4)])
def test_rows(shape, dtype):
    delta = filled(draw(0, EXPERTS, *shape), dtype)
    index = np.array([[1, 3], [0, 1]])
    np.testing.assert_allclose(
        restored(delta.rows(index)) if len(shape) > 1 else restored_vector(delta.rows(index)),
        restored(delta)[:, index],
        rtol=1e-6,
    )


def restored_vector(delta: QuantizedDelta) -> np.ndarray:
    return np.asarray(delta.values, np.float64) * np.asarray(delta.steps)[:, None]


def test_quantizing_twice_changes_nothing():
    values, steps = quantize(draw(0, 6, 5), INT8)
    again, same = quantize((values * steps).astype(np.float32), INT8)
    np.testing.assert_array_equal(again, values)
    np.testing.assert_allclose(same, steps, rtol=1e-6)


@pytest.mark.parametrize(
    "change", [lambda d: d.in_pieces(2, stacked=False), lambda d: d.by_direction(1)]
)
def test_what_takes_rows_apart_is_refused(change):
    with pytest.raises(InputError, match=r"task_vectors\.dtype: int8"):
        change(filled(draw(0, EXPERTS, 6, 5)))
