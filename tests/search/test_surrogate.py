import numpy as np
import pytest

from adamerge_jax.search.surrogate import Quadratic, count_unknowns, fit_quadratic


def terms_of(points: np.ndarray) -> np.ndarray:
    """The terms of a quadratic of three variables, written out."""
    x, y, z = points.T
    return np.stack([x**0, x, y, z, x * x, x * y, x * z, y * y, y * z, z * z], axis=1)


@pytest.fixture
def points() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 1, (25, 3))


@pytest.fixture
def values(points: np.ndarray) -> np.ndarray:
    return np.sin(3 * points).sum(1) + np.random.default_rng(1).normal(0, 0.1, 25)


def test_it_is_the_least_squares_solution(points, values):
    fit = fit_quadratic(points, values)
    numbers, *_ = np.linalg.lstsq(terms_of(points), values)
    others = np.random.default_rng(2).uniform(-1, 2, (50, 3))
    np.testing.assert_allclose(fit.surface(others), terms_of(others) @ numbers, atol=1e-10)
    error = np.sqrt(np.mean((terms_of(points) @ numbers - values) ** 2))
    assert fit.error == pytest.approx(error, abs=1e-12)
    assert fit.spread == pytest.approx(values.std())


def test_left_out_errors_are_those_of_fits_without_a_point(points, values):
    differences = []
    for left_out in range(len(points)):
        others = np.arange(len(points)) != left_out
        numbers, *_ = np.linalg.lstsq(terms_of(points[others]), values[others])
        differences.append(terms_of(points[[left_out]])[0] @ numbers - values[left_out])
    expected = np.sqrt(np.mean(np.square(differences)))
    assert fit_quadratic(points, values).left_out_error == pytest.approx(expected, rel=1e-9)


def test_a_quadratic_is_found_again(points):
    square = np.array([[1.0, 0.5, 0.0], [0.5, -2.0, 1.0], [0.0, 1.0, 3.0]])
    true = Quadratic(0.7, np.array([1.0, -2.0, 0.5]), square)
    fit = fit_quadratic(points, true(points))
    assert fit.surface.constant == pytest.approx(0.7)
    np.testing.assert_allclose(fit.surface.linear, true.linear, atol=1e-9)
    np.testing.assert_allclose(fit.surface.square, square, atol=1e-9)
    assert fit.error < 1e-10 and fit.left_out_error < 1e-9


def test_the_gradient_is_that_of_the_values(points, values):
    surface, step = fit_quadratic(points, values).surface, 1e-6
    numeric = [
        (surface(points[0] + step * axis) - surface(points[0] - step * axis)) / (2 * step)
        for axis in np.eye(3)
    ]
    np.testing.assert_allclose(surface.gradient(points[0]), numeric, atol=1e-7)


def test_points_on_a_line_have_the_smallest_of_all_solutions(values):
    line = np.repeat(np.linspace(0, 1, 25)[:, None], 3, axis=1)
    numbers, *_ = np.linalg.lstsq(terms_of(line), values)
    np.testing.assert_allclose(
        fit_quadratic(line, values).surface(line), terms_of(line) @ numbers, atol=1e-8
    )


@pytest.mark.parametrize(("dimensions", "unknowns"), [(1, 3), (3, 10), (8, 45)])
def test_unknowns_are_counted(dimensions: int, unknowns: int):
    assert count_unknowns(dimensions) == unknowns
