import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from adamerge_jax.errors import InputError
from adamerge_jax.objectives.regularizers import make_regularizer
from adamerge_jax.registry import allow_code

REGULARIZERS = [
    ("distance", {}),
    ("distance", {"p": 1}),
    ("distance", {"p": 2}),
    ("distance", {"p": 1.5}),
    ("lp_norm", {}),
    ("lp_norm", {"p": 2}),
    ("lp_norm", {"p": 3.0}),
    ("expert_entropy", {}),
]

SHAPES = {"all": (1, 4), "layers.*": (3, 4), "rows": (1, 4, 5)}
"""`[G, K, ...]`, of K = 4 experts."""


def draw(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=s).astype(np.float32) for name, s in SHAPES.items()}


def in_pytorch(name: str, options: dict, values: dict, start: dict) -> torch.Tensor:
    """A sum over experts of every group, and the mean of these."""
    p = options.get("p", 1)
    each = []
    for group, array in values.items():
        for layer, own in zip(array, start[group], strict=True):
            # [K, coefficients of an expert]
            now, before = layer.reshape(4, -1), own.reshape(4, -1)
            for column in range(now.shape[1]):
                experts = now[:, column]
                if name == "distance":
                    each.append(((experts - before[:, column]).abs() ** p).sum())
                elif name == "lp_norm":
                    each.append(torch.linalg.vector_norm(experts, p))
                else:
                    share = experts.abs() / experts.abs().sum()
                    each.append(-torch.xlogy(share, share).sum())
    return torch.stack(each).mean()


def both(name: str, options: dict, values: dict, start: dict):
    """Value and gradient in JAX and in PyTorch."""
    regularizer = make_regularizer(name, options)
    found = jax.jit(jax.value_and_grad(regularizer))(values, start)
    leaves = {group: torch.tensor(array, requires_grad=True) for group, array in values.items()}
    value = in_pytorch(name, options, leaves, {g: torch.tensor(a) for g, a in start.items()})
    value.backward()
    return found, (value.item(), {group: leaf.grad.numpy() for group, leaf in leaves.items()})


@pytest.mark.parametrize(("name", "options"), REGULARIZERS)
def test_value_and_gradient(name, options):
    (value, gradient), (expected, expected_gradient) = both(name, options, draw(0), draw(1))
    assert value.shape == ()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for group, array in expected_gradient.items():
        np.testing.assert_allclose(gradient[group], array, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), REGULARIZERS)
def test_the_kink_has_no_gradient(name, options):
    """At the start, and at 0, where |x| has no derivative, PyTorch and we take 0."""
    values = draw(0)
    for array in values.values():
        array[:, 1] = 0
    (_, gradient), (_, expected) = both(name, options, values, values)
    for group, array in gradient.items():
        if name == "distance":
            np.testing.assert_array_equal(array, 0)
        elif name == "lp_norm":
            np.testing.assert_allclose(array, expected[group], rtol=1e-4, atol=1e-6)
        else:
            # The entropy rises steeply from 0, in both directions.
            np.testing.assert_array_equal(array[:, 1], 0)


@pytest.mark.parametrize(("name", "options"), REGULARIZERS)
def test_coefficients_that_are_all_zero(name, options):
    zeros = {group: np.zeros(shape, np.float32) for group, shape in SHAPES.items()}
    value, gradient = jax.jit(jax.value_and_grad(make_regularizer(name, options)))(zeros, zeros)
    assert value == 0
    for array in gradient.values():
        np.testing.assert_array_equal(array, 0)


@pytest.mark.parametrize(("name", "options"), REGULARIZERS)
def test_more_groups_of_the_same_weigh_the_same(name, options):
    values, start = ({"all": jnp.asarray(draw(seed)["all"])} for seed in (0, 1))
    many, many_start = (
        {f"{i}.*": jnp.repeat(each["all"], i, axis=0) for i in (1, 2, 5)}
        for each in (values, start)
    )
    regularizer = make_regularizer(name, options)
    np.testing.assert_allclose(regularizer(many, many_start), regularizer(values, start), rtol=1e-6)


def test_experts_are_summed():
    values, start = {"all": jnp.full((2, 4), 0.5)}, {"all": jnp.full((2, 4), 0.2)}
    np.testing.assert_allclose(make_regularizer("distance", {})(values, start), 1.2, rtol=1e-6)
    np.testing.assert_allclose(make_regularizer("lp_norm", {})(values, start), 2.0, rtol=1e-6)
    np.testing.assert_allclose(make_regularizer("lp_norm", {"p": 2})(values, start), 1, rtol=1e-6)
    entropy = make_regularizer("expert_entropy", {})(values, start)
    np.testing.assert_allclose(entropy, np.log(4), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("distence", {}, "expected one of distance, .*nearest is 'distance'"),
        ("distance", {"q": 2}, "distance says: .*'q'.*its options are p"),
        ("distance", {"p": 0.5}, "distance says: p is 0.5, expected at least 1"),
        ("distance", {"p": "many"}, "distance says: "),
        ("lp_norm", {"p": 0}, "lp_norm says: p is 0, expected at least 1"),
        ("expert_entropy", {"p": 1}, "its options are none"),
        ("no_such_module:nothing", {}, "cannot be imported"),
    ],
)
def test_bad_options(name, options, message):
    allow_code([name])
    with pytest.raises(InputError, match=f"^regularizers: .*{message}") as caught:
        make_regularizer(name, options)
    assert "\n" not in str(caught.value)


def test_ones_own_regularizer(tmp_path, monkeypatch):
    (tmp_path / "own_regularizers.py").write_text(
        "from adamerge_jax import extension\n"
        "@extension\n"
        "def total(factor):\n"
        "    return lambda values, start: factor * sum(a.sum() for a in values.values())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    allow_code(["own_regularizers:total"])
    regularizer = make_regularizer("own_regularizers:total", {"factor": 3.0})
    assert regularizer({"all": jnp.ones((2, 4))}, {}) == 24
