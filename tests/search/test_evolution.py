import importlib.util

import numpy as np
import pytest

from adamerge_jax.errors import InputError
from adamerge_jax.search.evolution import Best, evolve, require_installed

TOP = np.array([0.7, 0.2, 0.5])
SETTINGS = dict(evaluations=120, sigma=0.2, bounds=(0.0, 1.0), seed=3)
START = np.full(3, 0.4)


def quadratic(point: np.ndarray) -> float:
    return -float(((point - TOP) ** 2 * [1, 4, 2]).sum())


def points_of(score=quadratic, **settings) -> tuple[list[np.ndarray], Best]:
    points = []

    def noted(point: np.ndarray) -> float:
        points.append(point)
        return score(point)

    return points, evolve(noted, Best(START, score(START)), **SETTINGS | settings)


def test_it_finds_the_top_of_a_known_quadratic():
    points, best = points_of()
    assert len(points) == 120
    np.testing.assert_allclose(best.point, TOP, atol=0.02)
    assert best.score == quadratic(best.point) == max(map(quadratic, points))


def test_the_same_seed_gives_the_same_points_and_another_one_others():
    first, again, other = (np.stack(points_of(seed=seed)[0]) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.isclose(first, other).all(1).any()


def test_points_stay_within_bounds():
    points, best = points_of(lambda point: point.sum(), bounds=(0.3, 0.6))
    assert np.min(points) >= 0.3 and np.max(points) <= 0.6
    np.testing.assert_allclose(best.point, 0.6, atol=0.05)


def test_a_start_that_nothing_beats_is_kept():
    best = evolve(lambda point: -1.0, Best(START, 0.0), **SETTINGS)
    assert best == Best(START, 0.0)


def test_scores_that_are_not_finite_are_the_worst():
    _, best = points_of(lambda point: quadratic(point) if point[0] < 0.6 else np.nan)
    np.testing.assert_allclose(best.point, [0.6, 0.2, 0.5], atol=0.03)


@pytest.mark.parametrize("evaluations", [1, 2, 7, 8, 15])
def test_the_number_of_evaluations_is_kept_to(evaluations: int):
    points, _ = points_of(evaluations=evaluations, population=7)
    assert len(points) == evaluations


def test_the_last_point_is_the_mean_of_the_last_distribution():
    points, _ = points_of(evaluations=8, population=7)
    best_three = sorted(points[:7], key=quadratic)[-3:]
    assert points[7].min() >= np.min(best_three) and points[7].max() <= np.max(best_three)
    assert quadratic(points[7]) > quadratic(START)
    alone, _ = points_of(evaluations=1)
    assert (alone[0] != START).all()  # which was scored before


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "adamerge_jax.search.evolution.find_spec",
        lambda name: None if name == "cmaes" else find_spec(name),
    )
    with pytest.raises(InputError, match=r"package cmaes; .*'adamerge_jax\[search\]'"):
        require_installed()
