"""Functions by name: one call for the same options, whoever asks."""

import numpy as np
import pytest

from adamerge_jax.errors import InputError
from adamerge_jax.registry import call_registered


class Made:
    """What the registered function returns."""

    def __init__(self, weights=None, power=1):
        if power == "bad":
            raise ValueError("power is bad")
        self.weights, self.power = weights, power


REGISTRY = {"made": Made}


def call(arguments=(), **options):
    return call_registered("field", REGISTRY, "made", options, arguments, returns=Made)


def test_the_same_options_are_one_call():
    made = call(power=2, weights={"a": 1, "b": [2, 3]})
    assert call(weights={"a": 1, "b": [2, 3]}, power=2) is made
    assert call() is call() is not made


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        (1, "1"),
        ([1], (1,)),
        ({1: 2}, {"1": 2}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),  # the first pattern that fits counts
    ],
)
def test_other_options_are_another_call(one, other):
    assert call(weights=one) is not call(weights=other)


def test_calls_with_arrays_are_not_kept():
    array = np.zeros(3)
    assert call(weights=array) is not call(weights=array)
    assert call(arguments=({"a": array},)) is not call(arguments=({"a": array},))


def test_calls_with_shapes_are_kept():
    made = call(arguments=({"a": (1,)},))
    assert call(arguments=({"a": (1,)},)) is made
    assert call(arguments=({"a": (2,)},)) is not made


def test_the_result_does_not_change_with_the_options():
    weights = {"a": 1}
    made = call(weights=weights)
    weights["a"] = 2
    assert made.weights == {"a": 1}
    assert call(weights=weights).weights == {"a": 2}


def test_refusals_are_not_kept():
    for _ in range(2):
        with pytest.raises(InputError, match="field: made says: power is bad"):
            call(power="bad")
        with pytest.raises(InputError, match="'powr'; its options are weights, power"):
            call(powr=2)
