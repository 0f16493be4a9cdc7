"""How many pieces tensors are cut into by their importance."""

import numpy as np
import pytest

from adamerge_jax.coefficients.granularities import GRANULARITIES, constant, make_granularity
from adamerge_jax.coefficients.importance import (
    FROM_COARSE,
    expected_granularity,
    importance_pieces,
)
from adamerge_jax.errors import InputError

TINY = {"a.weight": (4, 4), "b.weight": (4, 4), "c.bias": (4,)}
TINY_COEFFICIENTS = {
    "a.weight": np.array([0.5, -1.5]),
    "b.weight": np.array([1.0, 1.0]),
    "c.bias": np.array([-2.0, 2.0]),
}
TINY_MAGNITUDES = {
    "a.weight": np.array([2.0, 4.0]),
    "b.weight": np.array([1.0, 1.0]),
    "c.bias": np.array([0.0, 0.0]),
}


@pytest.mark.parametrize(
    ("budget", "a", "b"),
    [
        (6, 1, 1),
        (7, 1, 1),
        (8, 2, 1),
        (9, 2, 1),
        (10, 2, 2),
        (13, 2, 2),
        (14, 4, 2),
        (18, 4, 4),
        (26, 8, 4),
        (34, 8, 8),
        (66, 16, 16),
        (10_000, 16, 16),
    ],
)
def test_pieces_by_hand(budget, a, b):
    pieces = importance_pieces(TINY, TINY_COEFFICIENTS, TINY_MAGNITUDES, budget)
    assert pieces == {"a.weight": a, "b.weight": b, "c.bias": 1}


@pytest.mark.parametrize("seed", range(5))
def test_pieces(seed):
    generator = np.random.default_rng(seed)
    shapes = {f"encoder.{i}.weight": (16, 12) for i in range(6)} | {
        "odd.weight": (3, 5),
        "conv.weight": (6, 3, 2, 1),
        "word_embeddings.weight": (64, 16),
        "norm.weight": (16,),
    }
    coefficients = {name: generator.normal(size=3) for name in shapes}
    magnitudes = {name: generator.uniform(0, 5, 3) for name in shapes}
    budget = int(generator.integers(30, 400))
    pieces = importance_pieces(shapes, coefficients, magnitudes, budget)
    assert pieces.keys() == shapes.keys()
    assert 3 * sum(pieces.values()) <= budget
    for name, count in pieces.items():
        assert count.bit_count() == 1
        assert np.prod(shapes[name]) % count == 0
    for name in ("odd.weight", "word_embeddings.weight", "norm.weight"):
        assert pieces[name] == 1
    # Of tensors of one size, the more important one has at least as many.
    blocks = [name for name in shapes if name.startswith("encoder.")]
    totals = [
        sum(np.abs(each[name]).mean() for name in shapes) for each in (coefficients, magnitudes)
    ]
    score = {
        name: np.abs(coefficients[name]).mean() / totals[0] + magnitudes[name].mean() / totals[1]
        for name in blocks
    }
    counts = [pieces[name] for name in sorted(blocks, key=score.__getitem__)]
    assert counts == sorted(counts)
    # The granularity takes what comes out, stacked or not.
    granularity = GRANULARITIES["chunk"](shapes, pieces=pieces)
    values = granularity.init(constant(shapes, 3, 0.3))
    assert sum(array.size for array in values.values()) == 3 * sum(pieces.values())
    stacked = {"encoder.*.weight": (6, 16, 12)}
    values = GRANULARITIES["chunk"](stacked, pieces=pieces).init(constant(stacked, 3, 0.3))
    assert sum(array.size for array in values.values()) == 3 * sum(counts)


def test_pieces_where_nothing_was_learned():
    zeros = {name: np.zeros(2) for name in TINY}
    pieces = importance_pieces(TINY, zeros, zeros, 10)
    assert pieces == {"a.weight": 2, "b.weight": 2, "c.bias": 1}


def test_a_budget_that_is_too_small():
    with pytest.raises(InputError, match=r"budget: 5 is under .* raise it to at least 6$"):
        importance_pieces(TINY, TINY_COEFFICIENTS, TINY_MAGNITUDES, 5)


def test_it_resolves_to_chunk():
    (name,) = FROM_COARSE
    from_coarse = FROM_COARSE[name]
    options = {"budget": 8}
    resolved = from_coarse.resolve(options, TINY, TINY_COEFFICIENTS, TINY_MAGNITUDES)
    assert resolved == {"pieces": {"a.weight": 2, "b.weight": 1, "c.bias": 1}}
    expected = expected_granularity(name, {"budget": 100}, experts=2, tensors=3)
    assert expected == ("chunk", {"pieces": 16})
    assert expected_granularity(name, options, experts=2, tensors=30) == ("chunk", {"pieces": 1})
    for kind, chosen in (expected, (from_coarse.granularity, resolved)):
        assert make_granularity(kind, chosen, TINY).prepares
    assert expected_granularity("row", {"tables": True}, 2, 3) == ("row", {"tables": True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "importance_chunk takes one option, budget"),
        ({"budget": 8, "pieces": 2}, "importance_chunk takes one option, budget"),
        ({"budget": 0}, "budget is 0, expected a whole number"),
    ],
)
def test_options_that_it_does_not_take(options, message):
    with pytest.raises(InputError, match=message):
        FROM_COARSE["importance_chunk"].require_options(options)
