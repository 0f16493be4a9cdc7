"""The choice of the single coefficient that learning starts from."""

import math

import pytest

from adamerge_jax.learning.single_coefficient import CANDIDATES, best_single_coefficient


@pytest.mark.parametrize("best", [0.0, 0.05, 0.21, 0.3, 0.58, 1.0, 3.0])
def test_the_lowest_candidate_of_a_convex_objective_is_found(best):
    tried = []

    def objective(coefficient: float) -> float:
        tried.append(coefficient)
        return (coefficient - best) ** 2

    chosen = best_single_coefficient(objective)
    assert chosen == min(CANDIDATES, key=lambda coefficient: (coefficient - best) ** 2)
    assert len(tried) == len(set(tried))


def test_a_merge_that_is_not_finite_is_never_chosen():
    assert best_single_coefficient(lambda c: math.nan if c > 0.3 else -c) == 0.3
    assert best_single_coefficient(lambda c: math.inf if c >= 0.3 else c) == 0.05
