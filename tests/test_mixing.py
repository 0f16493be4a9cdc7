"""Lazy mixtures under `jit`, for whole tensors, against NumPy in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from adamerge_jax.coefficients.granularities import GRANULARITIES, constant
from adamerge_jax.mixing import Mixture, is_mixture, materialize, mix
from adamerge_jax.parameter_names import is_stacked
from adamerge_jax.task_vectors import DenseDelta

EXPERTS = 3
LAYERS = 3  # as many as experts: the two axes must not be taken for each other
SHAPES = {
    "logit_scale": (),
    "embeddings.position": (5,),
    "embeddings.word.weight": (7, 4),
    "embeddings.patch.bias": (6,),
    "embeddings.patch.weight": (6, 3, 2, 2),
    "encoder.*.scale": (LAYERS,),
    "encoder.*.bias": (LAYERS, 4),
    "encoder.*.weight": (LAYERS, 4, 5),
    "encoder.*.kernel": (LAYERS, 2, 3, 2, 2),
}
TOLERANCE = dict(rtol=1e-6, atol=1e-6)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def delta_shape(name: str) -> tuple[int, ...]:
    shape = SHAPES[name]
    return (shape[0], EXPERTS, *shape[1:]) if is_stacked(name) else (EXPERTS, *shape)


BASE = {name: draw(seed, *shape) for seed, (name, shape) in enumerate(SHAPES.items())}
DELTAS = {
    name: DenseDelta(draw(100 + seed, *delta_shape(name))) for seed, name in enumerate(SHAPES)
}


def expected(base: np.ndarray, delta: np.ndarray, scale: np.ndarray, stacked: bool) -> np.ndarray:
    experts = 1 if stacked else 0
    scaled = np.asarray(scale, np.float64) * delta
    assert scaled.shape == delta.shape
    return base + scaled.sum(experts)


WHOLE = ["task", "layer", "tensor"]
"""Granularities of whole tensors; the others are in test_granularities.py."""


def groups_of(name: str, granularity: str) -> list[str]:
    """The group of each tensor that a name in `SHAPES` stands for, or of all of them."""
    if granularity == "layer":
        layers = [f"encoder.{index}" for index in range(LAYERS)]
        return layers if is_stacked(name) else [name.partition(".")[0]]
    return [{"task": "all", "tensor": name}[granularity]]


@pytest.mark.parametrize("granularity", WHOLE)
def test_materialize(granularity):
    init, scales, *_ = GRANULARITIES[granularity](SHAPES)
    values = {
        group: draw(200 + seed, *array.shape)
        for seed, (group, array) in enumerate(init(constant(SHAPES, EXPERTS, 0.3)).items())
    }
    merged = jax.jit(lambda base, deltas, values: materialize(mix(base, deltas, scales(values))))(
        BASE, DELTAS, values
    )
    used = scales(values)
    assert merged.keys() == SHAPES.keys()
    for name, array in merged.items():
        assert array.dtype == jnp.float32
        np.testing.assert_allclose(
            array,
            expected(BASE[name], DELTAS[name].values, used[name], is_stacked(name)),
            **TOLERANCE,
            err_msg=name,
        )


@pytest.mark.parametrize("granularity", WHOLE)
def test_gradients_of_coefficients(granularity):
    init, scales, *_ = GRANULARITIES[granularity](SHAPES)
    values = init(constant(SHAPES, EXPERTS, 0.3))
    cotangents = {name: draw(300 + seed, *SHAPES[name]) for seed, name in enumerate(SHAPES)}

    def loss(values, base, deltas, cotangents):
        merged = materialize(mix(base, deltas, scales(values)))
        return sum(jnp.vdot(merged[name], cotangents[name]) for name in merged)

    gradients = jax.jit(jax.grad(loss))(values, BASE, DELTAS, cotangents)
    totals = {group: np.zeros(array.shape) for group, array in values.items()}
    for name in SHAPES:
        delta = np.asarray(DELTAS[name].values, np.float64)
        cotangent = cotangents[name]
        if not is_stacked(name):
            delta, cotangent = delta[None], cotangent[None]
        each = (delta * cotangent[:, None]).reshape(*delta.shape[:2], -1).sum(-1)
        groups = groups_of(name, granularity)
        if len(groups) == 1:
            total = totals[groups[0]]
            total += each if len(total) == len(each) else each.sum(0)
        else:
            for group, own in zip(groups, each, strict=True):
                totals[group] += own
    for group, total in totals.items():
        np.testing.assert_allclose(gradients[group], total, rtol=1e-5, atol=1e-5, err_msg=group)


def test_a_scale_per_row():
    scales = {
        "embeddings.word.weight": draw(0, EXPERTS, 7, 1),
        "encoder.*.weight": draw(1, LAYERS, EXPERTS, 4, 1),
    }
    deltas = {name: DELTAS[name] for name in scales}
    base = {name: BASE[name] for name in scales}
    merged = jax.jit(lambda *trees: materialize(mix(*trees)))(base, deltas, scales)
    for name, array in merged.items():
        wanted = expected(base[name], deltas[name].values, scales[name], is_stacked(name))
        np.testing.assert_allclose(array, wanted, **TOLERANCE)


def test_parameters_without_a_delta_stay_the_base():
    shapes = {"encoder.*.bias": SHAPES["encoder.*.bias"]}
    init, scales, *_ = GRANULARITIES["tensor"](shapes)
    deltas = {"encoder.*.bias": DELTAS["encoder.*.bias"]}
    nested = {"encoder": {"*": {"bias": BASE["encoder.*.bias"]}}, "head": BASE["logit_scale"]}
    mixed = mix(nested, deltas, scales(init(constant(shapes, EXPERTS, 0.5))))
    assert is_mixture(mixed["encoder"]["*"]["bias"])
    assert mixed["head"] is nested["head"]
    merged = materialize(mixed)
    assert not np.array_equal(merged["encoder"]["*"]["bias"], nested["encoder"]["*"]["bias"])


@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("index_shape", [(3,), (2, 4), (60,), (9, 7)])
def test_rows_are_rows_of_the_merged_parameter(rows, index_shape):
    base, values = draw(0, 50, 6), draw(1, EXPERTS, 50, 6)
    mixture = Mixture(base, DenseDelta(values), draw(2, EXPERTS, rows, 1))
    index = np.random.default_rng(3).integers(0, 50, index_shape)
    result = jax.jit(Mixture.rows)(mixture, index)
    assert result.shape == (*index_shape, 6)
    wanted = expected(base, values, mixture.scale, stacked=False)[index]
    np.testing.assert_allclose(result, wanted, **TOLERANCE)


def test_rows_mix_no_more_than_is_asked_for():
    mixture = Mixture(draw(0, 500, 6), DenseDelta(draw(1, EXPERTS, 500, 6)), draw(2, EXPERTS, 1, 1))

    def operations(index: np.ndarray) -> float:
        return jax.jit(Mixture.rows).lower(mixture, index).cost_analysis()["flops"]

    assert operations(np.zeros(20, int)) < operations(np.zeros(500, int)) / 10


def test_mixtures_go_through_scan():
    scale = draw(2, LAYERS, EXPERTS, 1, 1)
    mixture = Mixture(BASE["encoder.*.weight"], DELTAS["encoder.*.weight"], scale)

    def run(mixture, x):
        return jax.lax.scan(lambda x, layer: (x @ layer.materialize() @ y, None), x, mixture)[0]

    x, y = draw(0, 2, 4), draw(1, 5, 4)
    merged = expected(mixture.base, mixture.delta.values, scale, stacked=True)
    wanted = x.astype(np.float64)
    for weight in merged:
        wanted = wanted @ weight @ y
    np.testing.assert_allclose(jax.jit(run)(mixture, x), wanted, rtol=1e-5, atol=1e-5)


def test_a_bfloat16_base_is_rounded_once():
    # Neighbours of 256 in bfloat16 are 2 apart: 0.5 alone would be lost, 3 times 0.5 must not be.
    mixture = Mixture(
        np.full((2,), 256, ml_dtypes.bfloat16),
        DenseDelta(np.full((3, 2), 0.5, ml_dtypes.bfloat16)),
        np.ones((3, 1), np.float32),
    )
    merged = jax.jit(Mixture.materialize)(mixture)
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(merged, np.float32), [258, 258])
