"""The facts that a granularity tells of itself, computed from its scales and its preparation."""

import jax.numpy as jnp
import numpy as np
import pytest

from adamerge_jax.coefficients.granularities import Granularity, row
from adamerge_jax.parameter_names import is_stacked
from tests.coefficients.test_granularities import CASES, SHAPES, made

OF_PIECES = (
    "chunk",
    "chunk and tables",
    "uneven chunk",
    "partition",
    "singular",
    "all singular",
    "entry",
    "row_column",
    "row_column and tables",
)


@pytest.mark.parametrize("case", CASES)
def test_facts(case):
    granularity = made(case)
    assert granularity.prepares == (case in OF_PIECES)
    assert granularity.along_axes(SHAPES) == (case not in OF_PIECES)
    keeps_factors = case not in OF_PIECES or case.startswith("row_column")
    assert granularity.keeps_factors(SHAPES) == keeps_factors
    assert granularity.cuts_rows == (case in OF_PIECES and not case.startswith("row_column"))


def test_facts_do_not_depend_on_what_is_split():
    # One piece is the whole tensor, and yet laid out as pieces are.
    granularity = made("chunk", {"norm.bias": (6,)})
    assert granularity.prepares
    assert not granularity.along_axes({"norm.bias": (6,)})


def ones_own(shapes, tail) -> Granularity:
    """A granularity that says nothing of itself, with scales of a shape of one's choice."""
    sizes = {name: tail(shape[is_stacked(name) :]) for name, shape in shapes.items()}

    def init(start):
        return {
            name: jnp.broadcast_to(
                start[name].reshape(*start[name].shape, *(1 for _ in sizes[name])),
                (*start[name].shape, *sizes[name]),
            )
            for name in shapes
        }

    return Granularity(
        init,
        lambda values: {n: v if is_stacked(n) else v[0] for n, v in values.items()},
    )


@pytest.mark.parametrize(
    ("tail", "along_axes", "keeps_factors"),
    [
        (lambda shape: tuple(1 for _ in shape), True, True),
        (lambda shape: tuple(n if axis == 0 else 1 for axis, n in enumerate(shape)), True, True),
        (lambda shape: tuple(n if axis == 1 else 1 for axis, n in enumerate(shape)), True, True),
        (lambda shape: shape, True, False),
        (lambda shape: (), False, False),
        (lambda shape: tuple(2 for _ in shape), False, False),
    ],
    ids=["whole", "row", "column", "entry", "no axes", "other sizes"],
)
def test_facts_of_a_granularity_of_ones_own(tail, along_axes, keeps_factors):
    shapes = {"a.*.weight": (3, 4, 5), "b.weight": (6, 7)}
    granularity = ones_own(shapes, tail)
    assert not granularity.prepares
    assert granularity.along_axes(shapes) == along_axes
    assert granularity.keeps_factors(shapes) == keeps_factors


def test_a_preparation_of_ones_own_is_noticed():
    shapes = {"weight": (4, 5)}
    granularity = row(shapes)._replace(prepare=lambda name, delta: delta)
    assert granularity.prepares
    assert not granularity.along_axes(shapes) and not granularity.keeps_factors(shapes)
    start = {"weight": np.zeros((1, 2), np.float32)}
    assert granularity.scales(granularity.init(start))["weight"].shape == (2, 4, 1)
