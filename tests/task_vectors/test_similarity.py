"""Similarity of task vectors, against dense deltas in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adamerge_jax.task_vectors import DenseDelta, JoinedDelta, LowRankDelta
from adamerge_jax.task_vectors.offload.memory import make_memory
from adamerge_jax.task_vectors.similarity import cosines, gram, inner_products

EXPERTS, LAYERS, HEIGHT, WIDTH, RANK = 4, 2, 6, 5, 2
SHAPES = {"one": (HEIGHT, WIDTH), "stacked": (LAYERS, HEIGHT, WIDTH)}


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def deltas(kind: str, layers: tuple[int, ...]) -> tuple[object, np.ndarray]:
    """Deltas of a kind, and what they are entry by entry, `[..., K, m, n]`."""
    dense = numbers(0, *layers, EXPERTS, HEIGHT, WIDTH)
    left = numbers(1, *layers, EXPERTS, HEIGHT, RANK)
    right = numbers(2, *layers, EXPERTS, RANK, WIDTH)
    if kind == "dense":
        return DenseDelta(jnp.asarray(dense)), dense
    if kind == "bfloat16":
        values = jnp.asarray(dense, jnp.bfloat16)
        return DenseDelta(values), np.asarray(values, np.float32)
    if kind == "low rank":
        return LowRankDelta(jnp.asarray(left), jnp.asarray(right)), left @ right
    if kind == "of some":
        some = (2, 0)
        entries = np.zeros_like(dense)
        entries[..., some, :, :] = dense[..., :2, :, :]
        return JoinedDelta(
            (DenseDelta(jnp.asarray(dense[..., :2, :, :])),), (some,), EXPERTS
        ), entries
    if kind == "on the host":
        name = "layer.*.weight" if layers else "weight"
        return make_memory("host").keep(name, DenseDelta(dense)), dense
    low, high = (3, 0), (1, 0)  # expert 2 has no delta, expert 0 one of each kind
    joined = JoinedDelta(
        (
            LowRankDelta(jnp.asarray(left[..., :2, :, :]), jnp.asarray(right[..., :2, :, :])),
            DenseDelta(jnp.asarray(dense[..., :2, :, :])),
        ),
        (low, high),
        EXPERTS,
    )
    entries = np.zeros_like(dense)
    entries[..., low, :, :] += left[..., :2, :, :] @ right[..., :2, :, :]
    entries[..., high, :, :] += dense[..., :2, :, :]
    return joined, entries


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize(
    "kind", ["dense", "bfloat16", "low rank", "joined", "of some", "on the host"]
)
def test_inner_products(kind, layout):
    shape = SHAPES[layout]
    delta, entries = deltas(kind, shape[:-2])
    flat = entries.astype(np.float64).reshape(*shape[:-2], EXPERTS, -1)
    found = inner_products(delta, shape, EXPERTS, stacked=layout == "stacked")
    # Float32 sums of 30 terms of the order of 1, or of products of 2.
    np.testing.assert_allclose(found, flat @ flat.swapaxes(-1, -2), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("experts", [5, 8, 9])
def test_experts_outside_the_device_are_compared_in_blocks(experts):
    entries = numbers(4, 2, experts, 6, 5)
    delta = make_memory("disk").keep("layer.*.weight", DenseDelta(entries))
    flat = entries.astype(np.float64).reshape(2, experts, -1)
    found = inner_products(delta, (2, 6, 5), experts, stacked=True)
    np.testing.assert_allclose(found, flat @ flat.swapaxes(-1, -2), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(7,), ()])
def test_parameters_that_are_no_matrix(shape):
    values = numbers(3, EXPERTS, *shape)
    flat = values.reshape(EXPERTS, -1)
    found = inner_products(DenseDelta(jnp.asarray(values)), shape, EXPERTS, stacked=False)
    np.testing.assert_allclose(found, flat @ flat.T, rtol=1e-5, atol=1e-5)


def test_factors_are_never_multiplied_out():
    """No array on the way is as large as one expert's entries."""
    size = 1000
    delta = LowRankDelta(jnp.zeros((EXPERTS, size, RANK)), jnp.zeros((EXPERTS, RANK, size)))
    traced = jax.make_jaxpr(lambda delta: gram(delta, (size, size), EXPERTS))(delta)
    sizes = [out.aval.size for equation in traced.eqns for out in equation.outvars]
    assert 0 < max(sizes) < size * size


def test_cosines():
    vectors = np.array([[3.0, 4.0], [-3.0, -4.0], [4.0, -3.0], [0.0, 0.0]])
    expected = [[1, -1, 0, np.nan], [-1, 1, 0, np.nan], [0, 0, 1, np.nan], [np.nan] * 4]
    np.testing.assert_allclose(cosines(vectors @ vectors.T), expected, atol=1e-12)
