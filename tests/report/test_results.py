import pytest

from adamerge_jax.report.results import best_single, gap_closed, outcome
from adamerge_jax.runs.results import Row

ACCURACY = [
    Row("base", {"a": 0.2, "b": 0.9}),
    Row("experts (one model each)", {"a": 0.9, "b": 0.7}),
    Row("task arithmetic (0.3)", {"a": 0.5, "b": 0.7}),
    Row("learned (row)", {"a": 0.8, "b": 0.6}),
]
LOSS = [
    Row("experts (one model each)", {"a": 1.0, "b": 2.0}, "loss"),
    Row("task arithmetic (0.3) after interference steps", {"a": 3.0, "b": 2.5}, "loss"),
    Row("learned (row)", {"a": 1.5, "b": 3.0}, "loss"),
]


def test_the_best_single_model_is_no_expert():
    assert best_single(ACCURACY) == pytest.approx([0.8, 0.9, 0.7])
    assert best_single(LOSS) == pytest.approx([1.5, 2.5, 2.25])


def test_the_gap_closed():
    # By hand: 0.3 of 0.4; no gap; averages 0.8, 0.6 and 0.7.
    assert gap_closed(ACCURACY) == [pytest.approx(0.75), None, pytest.approx(0.5)]
    # 1.5 of 2; half a nat the wrong way; 0.5 of 1.25.
    assert gap_closed(LOSS) == [pytest.approx(0.75), pytest.approx(-1.0), pytest.approx(0.4)]


def test_the_outcome_in_a_sentence():
    reached = "The merge reaches 70.0% on average"
    closed = "and closes 50% of the gap between task arithmetic and the experts."
    assert outcome(ACCURACY) == f"{reached} {closed}"
    assert outcome(ACCURACY[2:]) == f"{reached}."
    assert outcome(LOSS[2:]) == "The merge reaches 2.250 nats per token on average."


def test_no_gap_without_its_ends():
    assert gap_closed(ACCURACY[2:]) is None
