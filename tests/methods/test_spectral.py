"""Methods by singular values against their papers' formulas in float64, for hard matrices too."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from adamerge_jax.cli.main import main
from adamerge_jax.errors import InputError
from adamerge_jax.interference import fit_steps
from adamerge_jax.methods import make_method, merged_parameters
from adamerge_jax.task_vectors import DenseDelta, JoinedDelta, LowRankDelta

EXPERTS, HEIGHT, WIDTH = 3, 8, 12


def directions(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.linalg.svd(matrix, full_matrices=False)


def procrustes(columns: np.ndarray) -> np.ndarray:
    left, _, right = directions(columns)
    return left @ right


def tsv_m_of(deltas: np.ndarray) -> np.ndarray:
    """Algorithm 1 of Gargiulo et al."""
    count = min(deltas.shape[1:]) // len(deltas)
    parts = [directions(delta) for delta in deltas]
    left = procrustes(np.hstack([u[:, :count] for u, _, _ in parts]))
    sizes = np.concatenate([s[:count] for _, s, _ in parts])
    right = procrustes(np.hstack([v[:count].T for _, _, v in parts]))
    return left @ np.diag(sizes) @ right.T


def iso_c_of(deltas: np.ndarray) -> np.ndarray:
    """Algorithm 1 of Marczak et al."""
    left, sizes, right = directions(deltas.sum(0))
    return sizes.mean() * left @ right


def iso_cts_of(deltas: np.ndarray, common: float) -> np.ndarray:
    """Algorithm 2 of Marczak et al."""
    experts, side = len(deltas), min(deltas.shape[1:])
    share = round((side - int(side * common)) / experts)
    rest = side - share * experts
    left, sizes, right = directions(deltas.sum(0))
    lefts, all_sizes, rights = [left[:, :rest]], [sizes[:rest]], [right[:rest].T]
    for delta in deltas:
        u, s, v = directions(delta - left[:, :rest] @ left[:, :rest].T @ delta)
        lefts.append(u[:, :share])
        all_sizes.append(s[:share])
        rights.append(v[:share].T)
    mean = np.concatenate(all_sizes).mean()
    return mean * procrustes(np.hstack(lefts)) @ procrustes(np.hstack(rights)).T


def interference(merged: np.ndarray, deltas: np.ndarray) -> float:
    """The objective of Cheng et al., equation 10."""
    terms = [np.square((merged - d) @ d.T).sum() / np.square(d).sum() for d in deltas]
    return float(sum(terms))


def wudi_of(deltas: np.ndarray, cutoff: float) -> np.ndarray:
    """The minimum along eigenvectors of large eigenvalues, the sum of task vectors along others."""
    weights = [1 / np.square(delta).sum() for delta in deltas]
    inputs = sum(w * delta.T @ delta for w, delta in zip(weights, deltas, strict=True))
    outputs = sum(w * delta @ delta.T @ delta for w, delta in zip(weights, deltas, strict=True))
    sizes, vectors = np.linalg.eigh(inputs)
    large = vectors[:, sizes >= cutoff * sizes.max()]
    solution = outputs @ large @ np.linalg.inv(large.T @ inputs @ large) @ large.T
    return solution + deltas.sum(0) @ (np.eye(len(inputs)) - large @ large.T)


def ace_of(deltas: np.ndarray, epsilon: float, tau: float, part: float) -> np.ndarray:
    """Equations 5 to 19 of Xu et al."""
    _, _, width = deltas.shape
    squares = np.square(deltas).sum((1, 2))
    gamma = 0.0
    if len(deltas) > 1:
        gamma = np.log(squares).var(ddof=1) / np.log(squares).mean() ** 2
    centred = deltas - deltas.mean(1, keepdims=True)
    covariances = [matrix.T @ matrix for matrix in centred]
    traces = [np.trace(matrix) if gamma > tau else 1.0 for matrix in covariances]
    covariances = [matrix / trace for matrix, trace in zip(covariances, traces, strict=True)]
    regularized = [
        matrix + epsilon / trace * np.eye(width)
        for matrix, trace in zip(covariances, traces, strict=True)
    ]
    prior = np.ones((width, 1)) @ sum(covariances).mean(0, keepdims=True)
    if gamma > tau:
        prior /= squares.mean()
    weighted = sum(w @ r for w, r in zip(centred, regularized, strict=True))
    merged = weighted @ np.linalg.inv(sum(regularized) + prior)
    if gamma <= tau:
        return merged
    mean = sum(regularized) / len(deltas)
    residual = sum(d @ (c - mean) for d, c in zip(deltas, covariances, strict=True))
    left, sizes, right = directions(merged + residual)
    count = int(part * len(sizes))
    return merged + sizes[:count].mean() * left[:, :count] @ right[:count]


def ties_of(values: np.ndarray, density: float) -> np.ndarray:
    trimmed = np.zeros_like(values)
    for row, value in zip(trimmed, values, strict=True):
        count = int(density * value.size) + 1
        largest = np.argsort(-np.abs(value).ravel(), kind="stable")[:count]
        row.ravel()[largest] = value.ravel()[largest]
    agreeing = np.where(np.sign(trimmed) == np.sign(trimmed.sum(0)), trimmed, 0)
    return agreeing.sum(0) / np.maximum((agreeing != 0).sum(0), 1)


def knots_of(deltas: np.ndarray, coefficient: float, density: float) -> np.ndarray:
    """Equations 4 to 6 of Stoica et al., with TIES."""
    left, sizes, right = directions(np.hstack(list(deltas)))
    aligned = np.stack(np.hsplit(np.diag(sizes) @ right, len(deltas)))
    return coefficient * left @ ties_of(aligned, density)


def opcm_of(deltas: np.ndarray, threshold: float) -> np.ndarray:
    """The authors' algorithm, with whole bases and a new scale after each expert."""
    merged, scale = deltas[0], 1.0
    norms = [np.linalg.norm(delta) for delta in deltas]
    for number, delta in enumerate(deltas[1:], start=2):
        left, sizes, right = np.linalg.svd(merged, full_matrices=True)
        leading = np.argmax(np.cumsum(sizes) / sizes.sum() > threshold)
        components = left.T @ delta @ right.T
        np.fill_diagonal(components, 0)
        components[:leading, :leading] = 0
        merged = scale * merged + left @ components @ right
        scale = np.linalg.norm(merged) / np.mean(norms[:number])
        merged = merged / scale
    return merged


def unequal(deltas: np.ndarray) -> np.ndarray:
    return deltas * np.array([0.05, 0.1, 0.2])[:, None, None]


CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "tsv_m": ("tsv_m", {}, tsv_m_of),
    "tsv_m scaled": ("tsv_m", {"coefficient": 0.5}, lambda deltas: 0.5 * tsv_m_of(deltas)),
    "iso_c": ("iso_c", {}, iso_c_of),
    "iso_cts": ("iso_cts", {}, lambda deltas: iso_cts_of(deltas, 0.8)),
    "iso_cts half": ("iso_cts", {"common": 0.5}, lambda deltas: iso_cts_of(deltas, 0.5)),
    "wudi": ("wudi", {}, lambda deltas: wudi_of(deltas, 0.1)),
    "wudi filtered": ("wudi", {"cutoff": 0.4}, lambda deltas: wudi_of(deltas, 0.4)),
    "ace": ("ace", {}, lambda deltas: ace_of(deltas, 0.01, 0.3, 0.3)),
    "ace refined": (
        "ace",
        {"regularization": 0.1, "heterogeneity": 0.0, "refined": 0.5},
        lambda deltas: ace_of(deltas, 0.1, 0.0, 0.5),
    ),
    "knots": ("knots", {}, lambda deltas: knots_of(deltas, 0.6, 0.2)),
    "opcm": ("opcm", {}, lambda deltas: opcm_of(deltas, 0.5)),
    "opcm leading": ("opcm", {"threshold": 0.8}, lambda deltas: opcm_of(deltas, 0.8)),
}


def merge(name: str, options: dict[str, Any], delta: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the merged task vector of one tensor, after the method's steps."""
    method = make_method(name, options)
    if method.interference:
        one_hot = jnp.eye(EXPERTS).reshape(EXPERTS, EXPERTS, *(1 for _ in shape))
        values = np.stack([delta.weighted_sum(scale) for scale in one_hot])
        fit_steps(method.interference, {"weight": values})
        delta = dense(values)
    base = {"weight": jnp.zeros(shape)}
    return np.asarray(merged_parameters(method, base, {"weight": delta}, EXPERTS)["weight"])


def dense(values: np.ndarray) -> DenseDelta:
    return DenseDelta(jnp.asarray(values, jnp.float32))


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (WIDTH, HEIGHT)], ids=["wide", "tall"])
@pytest.mark.parametrize("case", CASES)
def test_the_formula(case, shape):
    name, options, formula = CASES[case]
    deltas = unequal(np.random.default_rng(0).normal(size=(EXPERTS, *shape)))
    merged = merge(name, options, dense(deltas), shape)
    np.testing.assert_allclose(merged, formula(deltas), atol=1e-5)


NAMES = ["tsv_m", "iso_c", "iso_cts", "wudi", "ace", "knots", "opcm"]


def factors(height: int = HEIGHT, width: int = WIDTH, rank: int = 2) -> LowRankDelta:
    generator = np.random.default_rng(1)
    left = unequal(generator.normal(size=(EXPERTS, height, rank)))
    right = generator.normal(size=(EXPERTS, rank, width))
    return LowRankDelta(jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32))


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (WIDTH, HEIGHT)], ids=["wide", "tall"])
@pytest.mark.parametrize("name", NAMES)
def test_adapters_are_merged_in_small_bases_as_they_are_entry_by_entry(name, shape):
    delta = factors(*shape)
    entries = np.einsum("kmr,krn->kmn", delta.left, delta.right, dtype=np.float64)
    merged = merge(name, {}, delta, shape)
    assert np.abs(merged).max() > 0.1
    # Orthonormal sets of vectors that nearly depend on each other make float32's rounding larger.
    np.testing.assert_allclose(merged, merge(name, {}, dense(entries), shape), atol=2e-4)


@pytest.mark.parametrize("name", [*NAMES, "lora_lego"])
def test_experts_without_factors_of_a_tensor_change_nothing(name):
    """An adapter that skips a tensor is as one whose factors are 0."""
    both = factors()
    two = jax.tree.map(lambda array: array[np.array([0, 2])], both)
    joined = JoinedDelta((two,), ((0, 2),), EXPERTS)
    padded = LowRankDelta(both.left.at[1].set(0), both.right)
    merged = merge(name, {}, joined, (HEIGHT, WIDTH))
    np.testing.assert_allclose(merged, merge(name, {}, padded, (HEIGHT, WIDTH)), atol=2e-4)
    assert np.isfinite(merged).all()
    assert np.linalg.matrix_rank(merged, tol=1e-3) <= 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 9), (4, 3, 2, 2)], ids=str)
def test_any_shape_and_any_task_vectors_are_merged(name, shape):
    generator = np.random.default_rng(2)
    random = generator.normal(size=(EXPERTS, *shape))
    for deltas in (
        random,
        random * 1e-8,
        np.zeros_like(random),
        random * np.array([0, 0, 1]).reshape(-1, *(1 for _ in shape)),
        np.broadcast_to(random[0], random.shape),
        np.stack([random[0], -random[0], random[1]]),
        np.ones_like(random),
    ):
        merged = merge(name, {}, dense(deltas), shape)
        assert np.isfinite(merged).all()
        assert np.abs(merged).max() <= 10 * np.abs(deltas).sum()
        np.testing.assert_array_equal(merged, merge(name, {}, dense(deltas), shape))


@pytest.mark.parametrize("name", NAMES)
def test_one_expert_is_merged(name):
    """Of a single task vector all but KnOTS and ACE, which trim and shrink, make itself."""
    delta = 0.1 * np.random.default_rng(3).normal(size=(1, HEIGHT, WIDTH))
    options = {"cutoff": 1e-6} if name == "wudi" else {}
    method = make_method(name, options)
    values = delta.astype(np.float32)
    fit_steps(method.interference, {"weight": values})
    base, deltas = {"weight": jnp.zeros((HEIGHT, WIDTH))}, {"weight": dense(values)}
    merged = merged_parameters(method, base, deltas, 1)["weight"]
    expected = {
        "iso_c": iso_c_of(delta),
        "iso_cts": iso_c_of(delta),
        "knots": knots_of(delta, 0.6, 0.2),
        "ace": ace_of(delta, 0.01, np.inf, 0.3),
    }.get(name, delta[0])
    np.testing.assert_allclose(merged, expected, atol=2e-4)


def lower_interference_by_adam(deltas: np.ndarray, steps: int, rate: float) -> np.ndarray:
    """The authors' optimisation: Adam from the sum of the task vectors."""
    merged, mean, variance = deltas.sum(0), 0.0, 0.0
    for step in range(1, steps + 1):
        terms = ((merged - d) @ d.T @ d / np.square(d).sum() for d in deltas)
        gradient = 2 * sum(terms)
        mean = 0.9 * mean + 0.1 * gradient
        variance = 0.999 * variance + 0.001 * gradient**2
        scaled = np.sqrt(variance / (1 - 0.999**step)) + 1e-8
        merged = merged - rate * mean / (1 - 0.9**step) / scaled
    return merged


def test_wudi_interferes_less_than_the_steps_of_its_authors():
    deltas = unequal(np.random.default_rng(4).normal(size=(EXPERTS, HEIGHT, WIDTH)))
    by_steps = lower_interference_by_adam(deltas, 300, 1e-3)
    closed = merge("wudi", {"cutoff": 1e-6}, dense(deltas), (HEIGHT, WIDTH))
    filtered = merge("wudi", {"cutoff": 0.3}, dense(deltas), (HEIGHT, WIDTH))
    start, stepped, least, between = (
        interference(merged, deltas) for merged in (deltas.sum(0), by_steps, closed, filtered)
    )
    assert least < stepped < start
    assert least < between < start


def test_wudi_stays_small_where_the_minimum_is_not():
    """A direction in which all experts change little has a large minimum, beneath the cutoff."""
    deltas = unequal(np.random.default_rng(5).normal(size=(EXPERTS, HEIGHT, WIDTH)))
    deltas[:, :, 0] *= 1e-2
    kept = merge("wudi", {}, dense(deltas), (HEIGHT, WIDTH))
    raw = merge("wudi", {"cutoff": 1e-6}, dense(deltas), (HEIGHT, WIDTH))
    assert np.abs(raw[:, 0]).max() > 10 * np.abs(kept[:, 0]).max()


def lego(units: list[list[tuple[np.ndarray, np.ndarray]]], **options: Any) -> np.ndarray:
    """Merges adapters that are given as units `(b, a)`."""
    left = np.stack([np.stack([b for b, _ in adapter], axis=1) for adapter in units])
    right = np.stack([np.stack([a for _, a in adapter]) for adapter in units])
    delta = LowRankDelta(jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32))
    method = make_method("lora_lego", options)
    base = {"weight": jnp.zeros((HEIGHT, WIDTH))}
    return np.asarray(merged_parameters(method, base, {"weight": delta}, len(units))["weight"])


def mean_unit(units: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The product of one cluster's unit, Zhao et al., section 4."""
    both = np.stack([np.concatenate(unit) for unit in units])
    mean = both.mean(0)
    mean *= np.abs(both).max(1).mean() / np.abs(mean).max()
    return np.outer(mean[:HEIGHT], mean[HEIGHT:])


def test_lora_lego_merges_units_that_are_alike():
    generator = np.random.default_rng(6)
    first, second = generator.normal(size=(2, HEIGHT + WIDTH))

    def unit(direction: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
        moved = scale * (direction + 0.05 * generator.normal(size=direction.shape))
        return moved[:HEIGHT], moved[HEIGHT:]

    alike = [unit(first, scale) for scale in (0.5, 1.0, 2.0)]
    others = [unit(second, scale) for scale in (1.0, 0.3, 0.7)]
    # The two units of an adapter have no order.
    adapters = [[alike[0], others[0]], [others[1], alike[1]], [alike[2], others[2]]]
    expected = mean_unit(alike) + mean_unit(others)
    for seed in range(3):
        np.testing.assert_allclose(lego(adapters, seed=seed), expected, atol=1e-5)
    one = np.sqrt(2) * mean_unit(alike + others)
    np.testing.assert_allclose(lego(adapters, rank=1), one, atol=1e-5)
    # Without clusters the units of all adapters follow each other, which is a sum.
    total = sum(np.outer(b, a) for adapter in adapters for b, a in adapter)
    np.testing.assert_allclose(lego(adapters, rank=6), np.sqrt(2 / 6) * total, atol=1e-5)
    np.testing.assert_array_equal(lego(adapters, rank=6), lego(adapters, rank=100))


def test_lora_lego_of_adapters_that_are_the_same_is_each():
    generator = np.random.default_rng(7)
    adapter = [tuple(np.split(generator.normal(size=HEIGHT + WIDTH), [HEIGHT])) for _ in range(2)]
    expected = sum(np.outer(b, a) for b, a in adapter)
    np.testing.assert_allclose(lego([adapter] * 3), expected, atol=1e-5)


def test_lora_lego_refuses_experts_without_factors():
    deltas = np.ones((EXPERTS, HEIGHT, WIDTH))
    with pytest.raises(
        InputError, match=r"changed weight without low-rank factors.*keep_from_base"
    ):
        merge("lora_lego", {}, dense(deltas), (HEIGHT, WIDTH))


def test_whole_models_are_refused_by_lora_lego_before_anything_is_left(
    image_recipe, tmp_path, capsys
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(image_recipe))
    with pytest.raises(SystemExit) as exit_:
        main(["merge", str(recipe), "--method", "lora_lego", "--out", str(tmp_path / "merged")])
    assert exit_.value.code == 2
    assert "merge whole models by another method" in capsys.readouterr().err
    assert not (tmp_path / "merged" / "checkpoint").exists()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tsv_m", {"coefficient": 1e7}, "coefficient is 10000000.0, expected from -1e6 to 1e6"),
        ("iso_c", {"coefficient": -1e7}, "coefficient is"),
        ("iso_cts", {"common": 1.5}, "common is 1.5, expected from 0 to 1"),
        ("wudi", {"cutoff": 0.0}, "cutoff is 0.0, expected from 1e-6"),
        ("ace", {"regularization": 0}, "regularization is 0, expected over 0"),
        ("ace", {"heterogeneity": -1.0}, "heterogeneity is -1.0, expected at least 0"),
        ("ace", {"refined": 2.0}, "refined is 2.0, expected from 0 to 1"),
        ("knots", {"density": 0.0}, "density is 0.0, expected over 0 and up to 1"),
        ("lora_lego", {"rank": 0}, "rank is 0, expected a whole number, at least 1"),
        ("lora_lego", {"seed": -1}, "seed is -1, expected a whole number, at least 0"),
        ("opcm", {"threshold": 1.5}, "threshold is 1.5, expected from 0 to 1"),
    ],
)
def test_options_are_in_their_range(name, options, message):
    with pytest.raises(InputError, match=message):
        make_method(name, options)
