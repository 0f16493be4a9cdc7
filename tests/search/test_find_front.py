"""The front of scores that are known functions of the coefficients."""

import numpy as np
import pytest

from adamerge_jax.errors import InputError
from adamerge_jax.recipes.schema import FrontRecipe
from adamerge_jax.search.find_front import FoundFront, count_samples, find_front
from adamerge_jax.search.scored import Scored
from adamerge_jax.search.scores import Score

TOPS = np.array([[0.8, 0.1], [0.2, 0.7]])
"""The coefficients that are best for each of two tasks."""

SETTINGS = FrontRecipe(points=8, bounds=(0.0, 1.0))


class Pairs:
    """Two coefficients, without models."""

    size = 2

    def all_at(self, value: float) -> np.ndarray:
        return np.full(2, value)

    def by_group(self, point: np.ndarray) -> dict[str, list[float]]:
        return {"all": point.tolist()}

    def point(self, by_group: dict[str, list[float]]) -> np.ndarray:
        return np.array(by_group["all"])


def losses(pairs: Pairs, point: np.ndarray) -> dict[str, float]:
    """Bowls that are no quadratics: the first grows as the fourth power far off."""
    first, second = np.square(point - TOPS).sum(1)
    return {"first": first + first**2, "second": second}


def found(measure=losses, maximise: bool = False, log=()) -> tuple[FoundFront, Scored]:
    scored = Scored(Pairs(), Score("loss", maximise, measure), list(log))
    return find_front(Pairs(), scored, SETTINGS, [0.2, 0.5], 24, seed=0), scored


def distance_to_line(points: np.ndarray) -> np.ndarray:
    along = (TOPS[1] - TOPS[0]) / np.linalg.norm(TOPS[1] - TOPS[0])
    away = points - TOPS[0]
    return np.abs(away[:, 0] * along[1] - away[:, 1] * along[0])


def test_points_lie_between_the_tops():
    front, scored = found()
    points = np.array([e.coefficients["all"] for e in front.evaluations])
    samples = np.array([e.coefficients["all"] for e in scored.evaluations if e.phase == "sample"])
    assert len(points) == 8 and len(samples) == 24
    assert distance_to_line(points).mean() < 0.03 < distance_to_line(samples).mean() / 3
    assert np.linalg.norm(points[0] - TOPS[0]) < 0.15  # best in the first task
    assert np.linalg.norm(points[-1] - TOPS[1]) < 0.1
    firsts = [e.tasks["first"] for e in front.evaluations]
    assert firsts == sorted(firsts)


def test_what_the_surfaces_say_of_a_point_is_without_it():
    front, _ = found()
    for evaluation, predicted in zip(front.evaluations, front.predicted, strict=True):
        # The second is a quadratic.
        assert predicted["second"] == pytest.approx(evaluation.tasks["second"], abs=1e-9)
        assert predicted["first"] != pytest.approx(evaluation.tasks["first"], abs=1e-9)
        assert predicted["first"] == pytest.approx(evaluation.tasks["first"], abs=0.5)
    assert front.fits["second"].left_out_error < 1e-9 < front.fits["first"].error


def test_more_may_be_better():
    def scores(pairs: Pairs, point: np.ndarray) -> dict[str, float]:
        return {task: -loss for task, loss in losses(pairs, point).items()}

    (front, _), (turned, _) = found(), found(scores, maximise=True)
    assert [e.coefficients for e in front.evaluations] == [
        e.coefficients for e in turned.evaluations
    ]


def test_merges_without_a_score_are_left_out():
    def broken(pairs: Pairs, point: np.ndarray) -> dict[str, float]:
        return losses(pairs, point) | ({"second": np.nan} if point[0] > 0.6 else {})

    front, scored = found(broken)
    lost = [e for e in scored.evaluations if e.coefficients["all"][0] > 0.6]
    assert lost and not {e.number for e in lost} & {e.number for e in front.measured}
    assert all(e.coefficients["all"][0] <= 0.6 for e in front.evaluations)
    assert len(front.measured) + len(lost) == len(scored.evaluations)


def test_no_scores_at_all():
    with pytest.raises(InputError, match=r"front: 0 of 26 merges have finite scores, and 7 are"):
        found(lambda pairs, point: {"first": np.nan, "second": 1.0})


def test_a_log_gives_the_same_front_without_measuring():
    front, scored = found()

    def never(pairs: Pairs, point: np.ndarray) -> dict[str, float]:
        raise AssertionError("measured again")

    again, _ = found(never, log=scored.evaluations)
    assert again.evaluations == front.evaluations and again.predicted == front.predicted


def test_samples_are_enough_for_a_surface():
    assert count_samples(FrontRecipe(), 3) == 40
    assert count_samples(FrontRecipe(samples=11), 3) == 11
    with pytest.raises(InputError, match=r"10 merges cannot tell the 10 numbers .* at least 11"):
        count_samples(FrontRecipe(samples=10), 3)
