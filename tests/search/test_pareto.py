import numpy as np
import pytest

from adamerge_jax.runs.front import non_dominated
from adamerge_jax.search.pareto import spread_out, sweep, weight_sets
from adamerge_jax.search.surrogate import Quadratic


def test_non_dominated_points_are_those_that_no_other_one_dominates():
    scores = np.random.default_rng(0).integers(0, 5, (60, 3)).astype(float)
    scores[7] = scores[3] = [5.0, 0.0, 0.0]  # the same twice: the first counts
    expected = [
        not any(
            (other >= score).all() and ((other > score).any() or position < at)
            for position, other in enumerate(scores)
            if position != at
        )
        for at, score in enumerate(scores)
    ]
    np.testing.assert_array_equal(non_dominated(scores), expected)
    assert expected[3] and not expected[7]


def test_points_are_spread_out():
    line = np.linspace(0, 1, 11)[:, None]
    assert spread_out(line, [0], 3) == [0, 10, 5]
    assert sorted(spread_out(line, [4, 4], 11)) == list(range(11))


def test_weights_are_equal_ones_each_task_and_others():
    weights = weight_sets(3, 9, seed=0)
    assert weights.shape == (9, 3)
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(weights[:4], [[1 / 3] * 3, *np.eye(3)])
    distances = np.linalg.norm(weights[:, None] - weights, axis=-1) + np.eye(9)
    assert distances.min() > 0.15
    np.testing.assert_array_equal(weights, weight_sets(3, 9, seed=0))


def bowl(top: tuple[float, float]) -> Quadratic:
    """`-|x - top|^2`."""
    return Quadratic(-float(np.square(top).sum()), 2 * np.array(top), -np.eye(2))


def test_the_sweep_reaches_the_front_of_two_bowls():
    """Best for one or both of them are the points on the line between their tops."""
    tops = (0.2, 0.4), (0.8, 0.6)
    points = sweep([bowl(top) for top in tops], weight_sets(2, 9, seed=0), (0.0, 1.0), seed=0)
    along = (points - tops[0]) @ np.subtract(*tops[::-1]) / np.square(np.subtract(*tops)).sum()
    np.testing.assert_allclose(
        points, tops[0] + along[:, None] * np.subtract(*tops[::-1]), atol=1e-4
    )
    assert along[0] == pytest.approx(0.5, abs=1e-4)  # equal weights
    assert along[1] < 0.2 and along[2] > 0.8  # each task alone, but for the least weight
    assert np.diff(np.sort(along)).max() < 0.25


def test_the_sweep_stays_within_bounds():
    points = sweep([bowl((0.5, 3.0)), bowl((-2.0, 0.5))], weight_sets(2, 5, seed=0), (0, 1), seed=0)
    assert points.min() >= 0 and points.max() <= 1
    assert points[1][1] == pytest.approx(1) and points[2][0] == pytest.approx(0)


def test_parts_of_a_front_that_are_not_convex_are_reached():
    """Of `-x^2 - y^2` falling from its corner, sums of weights know the two ends alone."""
    first = Quadratic(0.0, np.zeros(2), np.array([[-1.0, 0.0], [0.0, 0.0]]))
    second = Quadratic(0.0, np.zeros(2), np.array([[0.0, 0.0], [0.0, -1.0]]))
    # On x + y = 1, made by a third score that falls off it quickly.
    on_line = Quadratic(-1.0, np.array([2.0, 2.0]), -np.ones((2, 2)))
    surfaces = [
        Quadratic(
            s.constant + 50 * on_line.constant,
            s.linear + 50 * on_line.linear,
            s.square + 50 * on_line.square,
        )
        for s in (first, second)
    ]
    points = sweep(surfaces, weight_sets(2, 7, seed=0), (0.0, 1.0), seed=0)
    np.testing.assert_allclose(points.sum(1), 1, atol=0.02)
    assert ((points[:, 0] > 0.3) & (points[:, 0] < 0.7)).sum() >= 2
