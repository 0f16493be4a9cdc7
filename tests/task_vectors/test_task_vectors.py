"""Task vectors, and sums over experts under `jit`, against NumPy in float64.

Deltas stored as factors are compared with their products, and with what a `DenseDelta` of the
products does.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adamerge_jax.errors import InputError
from adamerge_jax.mixing import Mixture
from adamerge_jax.task_vectors import (
    DenseDelta,
    JoinedDelta,
    LoadedDelta,
    LowRankDelta,
    task_vectors,
)

# Float32 sums of up to 8 terms of the order of 1: a few units in the last place.
TOLERANCE = dict(rtol=1e-6, atol=1e-6)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@jax.jit
def weighted_sum(values: jax.Array, scale: jax.Array) -> jax.Array:
    return DenseDelta(values).weighted_sum(scale)


@functools.partial(jax.jit, static_argnames="by_values")
def gradient(
    values: jax.Array, scale: jax.Array, cotangent: jax.Array, by_values: bool = False
) -> jax.Array:
    def product(values: jax.Array, scale: jax.Array) -> jax.Array:
        return jnp.vdot(DenseDelta(values).weighted_sum(scale), cotangent)

    return jax.grad(product, argnums=0 if by_values else 1)(values, scale)


@st.composite
def shapes_and_scales(draw) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of K deltas of rank 0 to 4, and of a scale that varies along some of their axes."""
    shape = draw(st.lists(st.integers(1, 4), max_size=4))
    varies = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    experts = draw(st.integers(1, 4))
    along = [size if vary else 1 for size, vary in zip(shape, varies, strict=True)]
    return (experts, *shape), (experts, *along)


# Of over two experts gradients are computed one after the other, of over 16 the sum is no chain.
@settings(max_examples=30)
@given(shapes_and_scales())
@example(((19, 3, 4), (19, 3, 1)))
@example(((16, 3, 4), (16, 3, 4)))
@example(((3, 5, 4), (3, 5, 1)))
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
    by_values = gradient(values, scale, cotangent, by_values=True)
    np.testing.assert_allclose(by_values, np.broadcast_to(scale * cotangent, shapes[0]), rtol=1e-6)


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


def test_what_is_no_number_stays_the_bases():
    """The state of a Flax NNX model with dropout holds a random key and its counter."""

    def model(kernel: float, seed: int) -> dict[str, jax.Array]:
        count = jnp.asarray(seed, jnp.uint32)
        return {"kernel": jnp.full((2, 2), kernel), "key": jax.random.key(seed), "count": count}

    deltas = task_vectors(model(1.0, 3), [model(2.0, 1), model(3.0, 2)])
    assert list(deltas) == ["kernel"]
    np.testing.assert_array_equal(deltas["kernel"].values[:, 0, 0], [1, 2])


EXPERTS, ROWS, COLUMNS, LAYERS = 3, 6, 5, 3
SCALES = {
    "whole": (EXPERTS, 1, 1),
    "by row": (EXPERTS, ROWS, 1),
    "by column": (EXPERTS, 1, COLUMNS),
}


class Case(NamedTuple):
    """Deltas in some representation, and what they are."""

    delta: LoadedDelta
    values: np.ndarray

    @property
    def dense(self) -> DenseDelta:
        return DenseDelta(self.values.astype(np.float32))

    @property
    def stacked(self) -> bool:
        return self.values.ndim == 4


def factors(seed: int, rank: int, *lead: int) -> LowRankDelta:
    return LowRankDelta(draw(seed, *lead, ROWS, rank), draw(seed + 1, *lead, rank, COLUMNS))


def products(delta: LowRankDelta) -> np.ndarray:
    return delta.left.astype(np.float64) @ delta.right


def low_rank(rank: int, *lead: int) -> Case:
    """All experts as factors of one rank."""
    delta = factors(10, rank, *lead, EXPERTS)
    return Case(delta, products(delta))


def joined(*lead: int) -> Case:
    """Experts 0 and 2 as factors, expert 1 entry by entry."""
    some, whole = factors(20, 2, *lead, 2), draw(22, *lead, 1, ROWS, COLUMNS)
    values = np.zeros((*lead, EXPERTS, ROWS, COLUMNS))
    values[..., [0, 2], :, :], values[..., [1], :, :] = products(some), whole
    return Case(JoinedDelta((some, DenseDelta(whole)), ((0, 2), (1,)), EXPERTS), values)


def mixed_layers() -> Case:
    """Expert 2 has factors in the first layer and is stored entry by entry in the others."""
    case = joined(LAYERS)
    some, whole = case.delta.parts
    some.left[1:, 1] = 0
    whole = np.concatenate([whole.values, draw(25, LAYERS, 1, ROWS, COLUMNS)], axis=1)
    whole[0, 1] = 0
    values = case.values
    values[:, [0, 2]] = products(some)
    values[:, [1, 2]] += whole
    values[:, 1] = whole[:, 0]
    return Case(JoinedDelta((some, DenseDelta(whole)), ((0, 2), (1, 2)), EXPERTS), values)


def only_some() -> Case:
    """Expert 1 did not change the parameter."""
    some = factors(30, 2, 2)
    values = np.zeros((EXPERTS, ROWS, COLUMNS))
    values[[0, 2]] = products(some)
    return Case(JoinedDelta((some,), ((0, 2),), EXPERTS), values)


SINGLE = {
    "rank 2": lambda: low_rank(2),
    "rank 1": lambda: low_rank(1),
    # More than a matrix of this shape can have.
    "rank 7": lambda: low_rank(7),
    "joined": joined,
    "only some": only_some,
}
STACKED = {
    "stacked": lambda: low_rank(2, LAYERS),
    "stacked, joined": lambda: joined(LAYERS),
    "mixed layers": mixed_layers,
}
CASES = SINGLE | STACKED

FACTORED = dict(rtol=1e-5, atol=1e-5)
"""Products in float32 of factors that are products of up to 7 terms."""


@functools.partial(jax.jit, static_argnames="stacked")
def sums_and_gradients(delta, scale, cotangent, stacked):
    """The sums over experts, layer by layer as in a model, and the gradient of the scale."""

    def total(scale):
        if stacked:
            body = lambda _, layer: (None, layer[0].weighted_sum(layer[1]))  # noqa: E731
            result = jax.lax.scan(body, None, (delta, scale))[1]
        else:
            result = delta.weighted_sum(scale)
        return jnp.vdot(result, cotangent), result

    gradient, result = jax.grad(total, has_aux=True)(scale)
    return result, gradient


def require_like_dense(delta, dense, scale, *, stacked, exact=None):
    """Sums and gradients are those of the dense deltas (and, where given, the exact sums)."""
    cotangent = draw(40, *((LAYERS,) if stacked else ()), ROWS, COLUMNS)
    result, gradient = sums_and_gradients(delta, scale, cotangent, stacked)
    expected, expected_gradient = sums_and_gradients(dense, scale, cotangent, stacked)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected if exact is None else exact, **FACTORED)
    np.testing.assert_allclose(gradient, expected_gradient, **FACTORED)


def scale_for(case: Case, shape: tuple[int, ...]) -> np.ndarray:
    return draw(41, *((LAYERS,) if case.stacked else ()), *shape)


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("name", CASES)
def test_sums_of_factors(name, kind):
    case = CASES[name]()
    scale = scale_for(case, SCALES[kind])
    exact = (scale.astype(np.float64) * case.values).sum(-3)
    require_like_dense(case.delta, case.dense, scale, stacked=case.stacked, exact=exact)


def test_sums_of_factors_under_vmap():
    case = CASES["stacked, joined"]()
    scale = scale_for(case, SCALES["by row"])
    result = jax.jit(jax.vmap(lambda delta, own: delta.weighted_sum(own)))(case.delta, scale)
    exact = (scale.astype(np.float64) * case.values).sum(1)
    np.testing.assert_allclose(result, exact, **FACTORED)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("name", SINGLE)
def test_products_with_factors(name, kind, tokens):
    case = CASES[name]()
    x, base = draw(42, tokens, COLUMNS), draw(43, ROWS, COLUMNS)
    scale = scale_for(case, SCALES[kind])
    expected = x @ (scale.astype(np.float64) * case.values).sum(0).T
    product = jax.jit(lambda delta, *own: delta.product(*own))(case.delta, x, scale)
    # With many tokens, or where some experts are dense, a sum and one product are less work.
    assert (product is None) == (name == "joined" or tokens == 40)
    if product is not None:
        np.testing.assert_allclose(product, expected, **FACTORED)
    applied = jax.jit(Mixture.apply)(Mixture(base, case.delta, scale), x)
    np.testing.assert_allclose(applied, x @ base.T.astype(np.float64) + expected, **FACTORED)


@pytest.mark.parametrize("seed", [None, 5])
# 4 and 7 do not divide the 30 entries; with 7, what would be the last piece but one is short.
@pytest.mark.parametrize("pieces", [5, 4, 7, ROWS * COLUMNS])
@pytest.mark.parametrize("name", ["rank 2", "joined", "stacked", "mixed layers"])
def test_pieces_of_factors(name, pieces, seed):
    """Every entry has the coefficient that the same entry has where deltas are dense."""
    case = CASES[name]()
    cut = case.delta.in_pieces(pieces, stacked=case.stacked, seed=seed)
    dense = case.dense.in_pieces(pieces, stacked=case.stacked, seed=seed)
    scale = scale_for(case, (EXPERTS, pieces, 1))
    order = np.arange(ROWS * COLUMNS)
    if seed is not None:
        order = np.random.default_rng([seed, order.size]).permutation(order.size)
    piece = np.empty(order.size, int)
    piece[order] = np.arange(order.size) // -(-order.size // pieces)
    of_entries = scale[..., piece, 0].astype(np.float64).reshape(case.values.shape)
    exact = (of_entries * case.values).sum(-3)
    require_like_dense(cut, dense, scale, stacked=case.stacked, exact=exact)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("name", ["rank 2", "rank 7", "joined", "stacked", "mixed layers"])
def test_singular_directions_of_factors(name, rank):
    """Below, at and above the factors' own rank."""
    case = CASES[name]()
    by_direction, dense = case.delta.by_direction(rank), case.dense.by_direction(rank)
    u, s, v = np.linalg.svd(case.values, full_matrices=False)
    parts = np.einsum("...mr,...r,...rn->...rmn", u, s, v)
    rest = parts[..., rank:, :, :].sum(-3, keepdims=True)
    parts = np.concatenate([parts[..., :rank, :, :], rest], axis=-3)
    scale = scale_for(case, (EXPERTS, rank + 1))
    exact = np.einsum("...kr,...krmn->...mn", scale.astype(np.float64), parts)
    require_like_dense(by_direction, dense, scale, stacked=case.stacked, exact=exact)


@pytest.mark.parametrize("name", ["rank 2", "joined", "stacked"])
def test_all_singular_directions_of_factors(name):
    """Factors have as many as their rank; the coefficients beyond it are those of zeros."""
    case = CASES[name]()
    by_direction, dense = case.delta.by_direction(None), case.dense.by_direction(None)
    u, s, v = np.linalg.svd(case.values, full_matrices=False)
    parts = np.einsum("...mr,...r,...rn->...rmn", u, s, v)
    scale = scale_for(case, (EXPERTS, min(ROWS, COLUMNS)))
    exact = np.einsum("...kr,...krmn->...mn", scale.astype(np.float64), parts)
    require_like_dense(by_direction, dense, scale, stacked=case.stacked, exact=exact)


@pytest.mark.parametrize("name", CASES)
def test_norms_of_factors(name):
    case = CASES[name]()
    norms = case.delta.norms(stacked=case.stacked)
    np.testing.assert_allclose(norms, np.linalg.norm(case.values, axis=(-2, -1)), rtol=1e-5)
    np.testing.assert_allclose(norms, case.dense.norms(stacked=case.stacked), rtol=1e-5)


@pytest.mark.parametrize("index", [[3], [[1, 3], [0, 1]]])
@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("name", ["rank 2", "rank 5", "joined", "only some"])
def test_rows_of_factors(name, kind, index):
    # Of rank 5, as many as columns: the one must not be taken for the other.
    case = CASES[name]() if name in CASES else low_rank(COLUMNS)
    index, base, scale = np.array(index), draw(44, ROWS, COLUMNS), scale_for(case, SCALES[kind])
    rows = jax.jit(Mixture.rows)(Mixture(base, case.delta, scale), index)
    expected = base + (scale.astype(np.float64) * case.values).sum(0)
    np.testing.assert_allclose(rows, expected[index], **FACTORED)


def test_factors_in_bfloat16_are_summed_in_float32():
    case = low_rank(2)
    left, right = (each.astype(ml_dtypes.bfloat16) for each in (case.delta.left, case.delta.right))
    scale = draw(45, *SCALES["by row"])
    result = jax.jit(LowRankDelta.weighted_sum)(LowRankDelta(left, right), scale)
    assert result.dtype == jnp.float32
    exact = (scale * (left.astype(np.float64) @ right.astype(np.float64))).sum(0)
    np.testing.assert_allclose(result, exact, **FACTORED)


@pytest.mark.parametrize("shape", [(EXPERTS, ROWS, COLUMNS), (EXPERTS, 2, 1), (2, 1, 1)])
def test_a_scale_that_no_factor_can_take_is_refused(shape):
    with pytest.raises(ValueError, match=r"is none for rows or columns of \(6, 5\)"):
        low_rank(2).delta.weighted_sum(draw(0, *shape))


@pytest.mark.parametrize("name", ["rank 2", "joined", "only some", "dense"])
def test_rows_of_pieces(name):
    case = CASES["rank 2" if name == "dense" else name]()
    delta = case.dense if name == "dense" else case.delta
    base, scale, index = draw(44, ROWS, COLUMNS), scale_for(case, (EXPERTS, 4, 1)), np.array([3, 1])
    rows = jax.jit(Mixture.rows)(Mixture(base, delta.in_pieces(4, stacked=False), scale), index)
    piece = np.arange(ROWS * COLUMNS) // -(-ROWS * COLUMNS // 4)
    spread = scale[:, piece.reshape(ROWS, COLUMNS), 0].astype(np.float64)
    np.testing.assert_allclose(rows, (base + (spread * case.values).sum(0))[index], **FACTORED)


def test_directions_of_a_table_have_no_rows():
    with pytest.raises(NotImplementedError, match="embedding tables stay whole"):
        low_rank(2).delta.by_direction(1).rows(np.array([0]))
