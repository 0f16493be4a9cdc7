"""Interference steps against a plain PyTorch transcription of TIES, and DARE against its odds."""

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from adamerge_jax.coefficients.file import Coefficients, Source
from adamerge_jax.errors import InputError
from adamerge_jax.interference import (
    STEPS,
    FittedStep,
    apply_steps,
    drop_and_rescale,
    elect_sign,
    fit_steps,
    make_step,
)
from adamerge_jax.registry import allow_code

EXPERTS = 4
SHAPES = {
    "logit_scale": (),
    "norm.bias": (6,),
    "dense.weight": (5, 7),
    "conv.weight": (3, 2, 2, 2),
    "other.weight": (9, 4),
}

TRIM = FittedStep("trim", {"density": 0.3})
ELECT_SIGN = FittedStep("elect_sign", {})
DISJOINT_MEAN = FittedStep("disjoint_mean", {})
DARE = FittedStep("drop_and_rescale", {"drop": 0.4, "seed": 3})
CHAINS = [
    [TRIM],
    [ELECT_SIGN],
    [DISJOINT_MEAN],
    [DARE],
    [TRIM, ELECT_SIGN],
    [TRIM, ELECT_SIGN, DISJOINT_MEAN],
    [DARE, ELECT_SIGN, TRIM],
    [TRIM, DARE, TRIM],
    [FittedStep("drop_extremes", {"smallest": 0.4, "largest": 0.1})],
    [FittedStep("balance_competition", {"density": 0.5})],
    [FittedStep("tall_mask", {"threshold": 0.4})],
    [FittedStep("consensus_mask", {"threshold": 0.6, "users": 2})],
    [FittedStep("scale_by_depth", {"first": 0.5})],
    [FittedStep("select_variable", {"density": 0.3}), FittedStep("weigh_by_squares", {})],
    [TRIM, FittedStep("balance_competition", {"density": 0.2}), ELECT_SIGN],
]


def draw(dtype: np.dtype | type = np.float32) -> dict[str, np.ndarray]:
    """Task vectors `[K, *shape]`, of unlike magnitudes so that one threshold is for all."""
    return {
        name: (np.random.default_rng(seed).normal(size=(EXPERTS, *shape)) * (seed + 1)).astype(
            dtype
        )
        for seed, (name, shape) in enumerate(SHAPES.items())
    }


def flattened(task_vectors: dict[str, np.ndarray]) -> torch.Tensor:
    """`[K, D]`, the whole model of every expert."""
    return torch.cat([torch.from_numpy(v).reshape(EXPERTS, -1) for v in task_vectors.values()], 1)


def torch_trim(flat: torch.Tensor, density: float) -> torch.Tensor:
    size = flat.shape[1]
    threshold = flat.abs().kthvalue(size - int(size * density), dim=1, keepdim=True).values
    return torch.where(flat.abs() >= threshold, flat, torch.zeros_like(flat))


def torch_elect(flat: torch.Tensor) -> torch.Tensor:
    sign = flat.sum(0).sign()
    agrees = torch.where(sign > 0, flat > 0, flat < 0)
    return flat * agrees


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.99])
def test_trim(density):
    task_vectors = draw()
    expected = torch_trim(flattened(task_vectors), density)
    (step,) = fit_steps([FittedStep("trim", {"density": density})], task_vectors)
    np.testing.assert_array_equal(flattened(task_vectors), expected)
    # As the authors' code counts, the threshold itself stays too.
    size = expected.shape[1]
    assert [np.count_nonzero(e) for e in expected.numpy()] == [int(size * density) + 1] * EXPERTS
    assert step.fitted == [e[e != 0].abs().min().item() for e in expected]


def test_trim_that_keeps_all():
    task_vectors = draw()
    fit_steps([FittedStep("trim", {"density": 1.0})], task_vectors)
    for name, values in draw().items():
        np.testing.assert_array_equal(task_vectors[name], values)


def test_trim_is_by_expert_and_over_the_whole_model():
    task_vectors = {"small": np.full((2, 10), 0.1, np.float32)}
    task_vectors["large"] = np.array([np.arange(1, 11), np.arange(101, 111)], np.float32)
    (step,) = fit_steps([FittedStep("trim", {"density": 0.25})], task_vectors)
    assert step.fitted == [5.0, 105.0]
    assert not task_vectors["small"].any()
    assert task_vectors["large"].tolist() == [
        [0, 0, 0, 0, 5, 6, 7, 8, 9, 10],
        [0, 0, 0, 0, 105, 106, 107, 108, 109, 110],
    ]


def test_elect_sign():
    task_vectors = draw()
    expected = torch_elect(flattened(task_vectors))
    fit_steps([ELECT_SIGN], task_vectors)
    np.testing.assert_array_equal(flattened(task_vectors), expected)


def test_elect_sign_by_hand():
    values = np.array([[3.0, -1, 0, 2], [-1.0, -2, 0, -5], [1.0, 4, 0, 0]], np.float32)
    found = elect_sign().apply("a", values, None)
    assert found.tolist() == [[3, 0, 0, 0], [0, 0, 0, -5], [1, 4, 0, 0]]


def test_disjoint_mean():
    task_vectors = draw()
    flat = torch_trim(flattened(task_vectors), 0.3)
    expected = flat.sum(0) / (flat != 0).sum(0).clamp(min=1)
    fit_steps([TRIM, DISJOINT_MEAN], task_vectors)
    np.testing.assert_allclose(flattened(task_vectors).sum(0), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("merge", ["mean", "sum"])
def test_ties(merge):
    task_vectors = draw()
    flat = torch_elect(torch_trim(flattened(task_vectors), 0.3))
    expected = flat.sum(0)
    steps = [TRIM, ELECT_SIGN]
    if merge == "mean":
        expected = expected / (flat != 0).sum(0).clamp(min=1)
        steps = [*steps, DISJOINT_MEAN]
    fit_steps(steps, task_vectors)
    np.testing.assert_allclose(flattened(task_vectors).sum(0), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("drop", [0.3, 0.9])
def test_dare_keeps_the_mean(drop):
    values = np.array([[1.0], [-2.0], [0.5]], np.float32) * np.ones((3, 100_000), np.float32)
    found = drop_and_rescale(drop).apply("dense.weight", values, None)
    kept = found != 0
    np.testing.assert_allclose(found[kept], (values / (1 - drop))[kept], rtol=1e-6)
    deviation = np.sqrt(drop * (1 - drop) / 100_000)
    np.testing.assert_allclose(kept.mean(1), 1 - drop, atol=4 * deviation)
    np.testing.assert_allclose(found.mean(1) / values[:, 0], 1, atol=4 * deviation / (1 - drop))


def test_dare_draws_by_seed_name_and_expert():
    values = np.ones((2, 1000), np.float32)
    found = drop_and_rescale(0.5, seed=1).apply("a", values, None)
    np.testing.assert_array_equal(drop_and_rescale(0.5, seed=1).apply("a", values, None), found)
    assert not np.array_equal(drop_and_rescale(0.5, seed=2).apply("a", values, None), found)
    assert not np.array_equal(drop_and_rescale(0.5, seed=1).apply("b", values, None), found)
    assert not np.array_equal(found[0], found[1])


def test_dare_that_drops_nothing():
    for name, values in draw().items():
        np.testing.assert_array_equal(drop_and_rescale(0.0).apply(name, values, None), values)


@pytest.mark.parametrize("chain", CHAINS)
def test_steps_run_in_their_order(chain):
    task_vectors, expected = draw(), draw()
    fitted = fit_steps(chain, task_vectors)
    for step in chain:
        function = STEPS[step.name](**step.options)
        seen = function.fit(expected)
        expected = {n: function.apply(n, values, seen) for n, values in expected.items()}
    for name, values in task_vectors.items():
        np.testing.assert_array_equal(values, expected[name])
    assert [replace(step, fitted=None) for step in fitted] == chain


def test_order_matters():
    one, other = draw(), draw()
    fit_steps([TRIM, ELECT_SIGN], one)
    fit_steps([ELECT_SIGN, TRIM], other)
    assert any((one[name] != other[name]).any() for name in one)


@pytest.mark.parametrize("chain", CHAINS)
def test_fitting_is_in_place_and_repeats_tensor_by_tensor(chain):
    task_vectors = draw()
    arrays = dict(task_vectors)
    fitted = fit_steps(chain, task_vectors)
    assert task_vectors.keys() == arrays.keys() == SHAPES.keys()
    for name, values in draw().items():
        assert task_vectors[name] is arrays[name]
        assert (arrays[name] != values).any() or not values.ndim > 1
        np.testing.assert_array_equal(apply_steps(fitted, name, values), arrays[name])


def test_views_are_changed_too():
    # As layers of one stack are given.
    stack = np.stack([draw()["dense.weight"], draw()["dense.weight"] / 100])
    fit_steps([TRIM], {"layer.0.weight": stack[0], "layer.1.weight": stack[1]})
    assert stack[0].any()
    assert not stack[1].any()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("chain", CHAINS[:6])
def test_half_precision(chain, dtype):
    task_vectors = draw(dtype)
    wide = {name: values.astype(np.float32) for name, values in task_vectors.items()}
    fitted, expected = fit_steps(chain, task_vectors), fit_steps(chain, wide)
    assert [step.name for step in fitted] == [step.name for step in expected]
    for name, values in task_vectors.items():
        assert values.dtype == dtype
        rounded = values.astype(np.float32)
        np.testing.assert_array_equal(rounded != 0, wide[name] != 0)
        # Rounded to 8 bits once, half of 2**-7; the divisor must not be rounded as well.
        np.testing.assert_allclose(rounded, wide[name], rtol=2**-8, atol=0)


@pytest.mark.parametrize("chain", CHAINS)
def test_steps_go_through_the_file(chain, tmp_path: Path):
    task_vectors = draw()
    fitted = fit_steps(chain, task_vectors)
    assert json.loads(json.dumps([step.fitted for step in fitted])) == [s.fitted for s in fitted]
    coefficients = Coefficients(
        values={"all": np.ones(EXPERTS, np.float32)},
        granularity="task",
        granularity_options={},
        interference=fitted,
        constraint="free",
        shapes=SHAPES,
        base=Source("base", "org/base", None, "sha256:0"),
        experts=tuple(Source(f"t{k}", f"t{k}", None, f"sha256:{k}") for k in range(EXPERTS)),
        objective="entropy",
        seed=0,
        step=0,
    )
    coefficients.save(tmp_path / "c.safetensors")
    loaded = Coefficients.load(tmp_path / "c.safetensors")
    assert loaded.interference == fitted
    for name, values in draw().items():
        found = apply_steps(loaded.interference, name, values)
        np.testing.assert_array_equal(found, task_vectors[name])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("name", STEPS)
def test_numbers_stay_finite(name, experts, dtype):
    """One expert, none that changes anything, one entry, and entries that are all the same."""
    drawn = np.random.default_rng(0).normal(size=(experts, 40))
    cases = [
        {"layer.0.weight": np.zeros((experts, 4, 2)), "bias": np.zeros(experts)},
        {"layer.0.weight": np.ones((experts, 3)), "other": np.zeros((experts, 2))},
        {"bias": np.full(experts, -2.0)},
        {"weight": drawn * 1e-7, "other": drawn * [[1000.0 * (k == 0)] for k in range(experts)]},
    ]
    for case in cases:
        task_vectors = {tensor: values.astype(dtype) for tensor, values in case.items()}
        (step,) = fit_steps([FittedStep(name, {})], task_vectors)
        assert all(np.isfinite(values).all() for values in task_vectors.values())
        assert make_step(name, {}).takes(json.loads(json.dumps(step.fitted)), experts)


def test_lines_scales_by_the_depth_of_each_stack():
    names = [f"encoder.block.{layer}.layer.0.weight" for layer in range(4)]
    names += ["decoder.block.0.weight", "decoder.block.1.weight", "shared.weight"]
    task_vectors = {name: np.ones((2, 3), np.float32) for name in names}
    (step,) = fit_steps([FittedStep("scale_by_depth", {"increase": 0.6})], task_vectors)
    assert step.fitted == {"encoder.block.*": 4, "decoder.block.*": 2}
    factors = [float(task_vectors[name][0, 0]) for name in names]
    assert factors == pytest.approx([0.5, 0.7, 0.9, 1.1, 0.5, 1.1, 0.5])
    (step,) = fit_steps(
        [FittedStep("scale_by_depth", {"layers": 7})],
        {"encoder.block.3.weight": np.ones((2, 3), np.float32)},
    )
    assert step.fitted == {"encoder.block.*": 7}


def test_many_experts_compete_without_overflow():
    task_vectors = {"weight": np.random.default_rng(0).normal(size=(120, 50)).astype(np.float32)}
    fit_steps([FittedStep("balance_competition", {"density": 0.5})], task_vectors)
    assert np.isfinite(task_vectors["weight"]).all()
    assert task_vectors["weight"].any()


def test_a_tall_mask_is_of_one_expert():
    values = np.array([[4.0, 1.0, 0.0], [1.0, 3.0, 0.0], [1.0, 1.0, 1.0]], np.float32)
    masked = make_step("tall_mask", {"threshold": 0.5}).apply("weight", values, None)
    assert masked.tolist() == [[4.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("name", "fitted"),
    [
        ("balance_competition", None),
        ("balance_competition", [[0.0, 1.0, 0.0, 1.0]]),
        ("balance_competition", [[0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, float("nan")]]),
        ("balance_competition", [[0.0, 1.0, 0.0, 1.0], [2.0, 1.0, 0.0, 1.0]]),
        ("balance_competition", [[0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]),
        ("scale_by_depth", None),
        ("scale_by_depth", {"encoder.layer.*": 0}),
        ("scale_by_depth", {"encoder.layer.*": 1.5}),
        ("scale_by_depth", [12]),
        ("drop_extremes", [1.0]),
    ],
)
def test_facts_that_no_fit_can_have_had(name, fitted):
    assert not make_step(name, {}).takes(fitted, 2)


@pytest.mark.parametrize("name", STEPS)
def test_no_task_vectors(name):
    # No expert differs from the base; the caller says so.
    (step,) = fit_steps([FittedStep(name, {})], {})
    assert step.name == name


def test_no_steps():
    task_vectors = draw()
    assert fit_steps([], task_vectors) == ()
    for name, values in draw().items():
        np.testing.assert_array_equal(task_vectors[name], values)
        assert apply_steps([], name, values) is values


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("trim", {"density": 0.0}, "density is 0.0, expected over 0 and up to 1"),
        ("trim", {"density": 1.5}, "density is 1.5"),
        ("trim", {"density": float("nan")}, "density is nan"),
        ("trim", {"density": "much"}, "trim"),
        ("trim", {"drop": 0.5}, "trim says: .*'drop'; its options are density$"),
        ("elect_sign", {"density": 0.5}, "elect_sign says: .*; its options are none$"),
        ("disjoint_mean", {"mean": True}, "disjoint_mean says: .*; its options are none$"),
        ("drop_and_rescale", {"drop": 1.0}, "drop is 1.0, expected from 0 and under 1"),
        ("drop_and_rescale", {"drop": -0.1}, "drop is -0.1"),
        ("drop_and_rescale", {"seed": -1}, "seed"),
        ("drop_and_rescale", {"density": 0.1}, "its options are drop, seed$"),
        ("drop_extremes", {"smallest": 1.0}, "smallest is 1.0, expected from 0 and under 1"),
        ("drop_extremes", {"smallest": 0.6, "largest": 0.4}, "0.6 and 0.4, expected a sum under 1"),
        ("balance_competition", {"density": 0}, "density is 0, expected over 0 and up to 1"),
        ("tall_mask", {"threshold": -0.1}, "threshold is -0.1, expected from 0 to 1e6"),
        ("consensus_mask", {"users": 0}, "users is 0, expected a whole number, at least 1"),
        ("scale_by_depth", {"increase": float("inf")}, "increase is inf"),
        ("scale_by_depth", {"layers": 0}, "layers is 0, expected a whole number from 1"),
        ("select_variable", {"density": 1.5}, "density is 1.5, expected over 0 and up to 1"),
        ("trimm", {}, r"found 'trimm'; expected one of .* \(nearest is 'trim'\)"),
        ("no_such_module:step", {}, "'no_such_module:step' cannot be imported"),
    ],
)
def test_bad_options(name, options, message):
    allow_code([name])
    with pytest.raises(InputError, match=message) as error:
        make_step(name, options)
    assert str(error.value).startswith("interference: ")
    assert "\n" not in str(error.value)


def test_ones_own_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_steps.py").write_text(
        "from adamerge_jax import extension\n"
        "from adamerge_jax.interference import Step\n"
        "\n"
        "@extension\n"
        "def largest(factor):\n"
        "    def fit(task_vectors):\n"
        "        return max(float(abs(v).max()) for v in task_vectors.values())\n"
        "    return Step(lambda name, values, fitted: values * factor / fitted, fit)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    allow_code(["my_steps:largest"])
    task_vectors = draw()
    (step,) = fit_steps([FittedStep("my_steps:largest", {"factor": 2.0})], task_vectors)
    assert step.fitted == max(abs(values).max() for values in draw().values())
    assert max(abs(values).max() for values in task_vectors.values()) == pytest.approx(2.0)
