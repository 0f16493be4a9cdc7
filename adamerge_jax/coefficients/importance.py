"""Granularities that follow from coarse coefficients: the ++ of Expert Merging.

Such a granularity is another one, of `GRANULARITIES`, with options that are known when coarse
coefficients have been learned. It has no function of shapes alone; `FROM_COARSE` has them all.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from adamerge_jax.coefficients.granularity import Shapes, can_be_split, require_whole
from adamerge_jax.errors import InputError


class FromCoarse(NamedTuple):
    """A granularity that is another one, whose options follow from coarse coefficients.

    Attributes:
        granularity: Name of the other one.
        require_options: `(options)`; refuses options of a recipe that it does not take.
        require_fitting: `(options, experts, tensors)`; refuses options that do not fit so many
            experts and merged tensors.
        expected: `(options, experts, tensors) -> options` of the other one that lead to about as
            many coefficients: for what is asked before any are learned.
        resolve: `(options, shapes, coefficients, magnitudes) -> options` of the other one, from
            shapes, coarse coefficients `[K]` and norms of the task vectors `[K]` by the names of
            merged tensors, without `*`.
    """

    granularity: str
    require_options: Callable[[Mapping[str, Any]], None]
    require_fitting: Callable[[Mapping[str, Any], int, int], None]
    expected: Callable[[Mapping[str, Any], int, int], dict[str, Any]]
    resolve: Callable[..., dict[str, Any]]


def expected_granularity(
    name: str, options: Mapping[str, Any], experts: int, tensors: int
) -> tuple[str, Mapping[str, Any]]:
    """Returns name and options of what a recipe's granularity is, or is likely to be once learned.

    Args:
        name: Name of the granularity in a recipe.
        options: Its options.
        experts: K.
        tensors: Number of merged tensors.
    """
    if name not in FROM_COARSE:
        return name, options
    from_coarse = FROM_COARSE[name]
    return from_coarse.granularity, from_coarse.expected(options, experts, tensors)


def importance_pieces(
    shapes: Shapes,
    coefficients: Mapping[str, Float[np.ndarray, " K"]],
    magnitudes: Mapping[str, Float[np.ndarray, " K"]],
    budget: int,
) -> dict[str, int]:
    """Returns the number of pieces that each tensor is cut into, by its importance.

    The importance of tensor t is

        s_t = c_t / sum(c) + m_t / sum(m) + p_t / sum(p)

    with `c_t` the mean over experts of its learned `|lambda|`, `m_t` the mean over experts of the
    norm `||tau||_2` of its task vectors, and `p_t` its number of entries. Every tensor starts as
    one piece. Again and again the one with the largest importance per piece, `s_t / n_t`, is cut
    twice as finely, as long as the budget lasts and the pieces stay of one size; unimportant
    tensors are never cut. (Zhang et al., 2025, score a layer by the same three quantities.)

    Args:
        shapes: Shapes of the tensors, by names without `*`.
        coefficients: Learned ones, per tensor.
        magnitudes: Norms of the task vectors, per tensor.
        budget: Largest number of coefficients of all K experts together.

    Raises:
        InputError: The budget is under one coefficient per tensor and expert.
    """
    names = list(shapes)
    experts = len(coefficients[names[0]])
    require_budget(budget, experts, len(names))
    quantities = (
        np.array([np.abs(coefficients[name]).mean() for name in names]),
        np.array([magnitudes[name].mean() for name in names]),
        np.array([prod(shapes[name]) for name in names], float),
    )
    importance = sum(
        quantity / max(quantity.sum(), np.finfo(float).tiny) for quantity in quantities
    )
    pieces = np.ones(len(names), int)
    can_be_cut = np.array([can_be_split(name, shapes[name]) for name in names])
    sizes = quantities[2].astype(int)
    while True:
        can_be_cut &= (sizes % (2 * pieces) == 0) & (experts * (pieces.sum() + pieces) <= budget)
        if not can_be_cut.any():
            return dict(zip(names, pieces.tolist(), strict=True))
        pieces[np.argmax(np.where(can_be_cut, importance / pieces, -1))] *= 2


def require_budget(budget: int, experts: int, tensors: int) -> None:
    """Refuses a budget under one coefficient per tensor and expert.

    Raises:
        InputError: Says how large it must be.
    """
    if budget < experts * tensors:
        raise InputError(
            f"coefficients.granularity_options.budget: {budget} is under one coefficient for each "
            f"of {experts} experts and {tensors} merged tensors; raise it to at least "
            f"{experts * tensors}"
        )


def _require_budget_alone(options: Mapping[str, Any]) -> None:
    if list(options) != ["budget"]:
        raise InputError(
            "coefficients.granularity_options: importance_chunk takes one option, budget: "
            "the largest number of coefficients"
        )
    require_whole("coefficients.granularity_options.budget", options["budget"], 1)


FROM_COARSE: dict[str, FromCoarse] = {
    "importance_chunk": FromCoarse(
        "chunk",
        _require_budget_alone,
        lambda options, experts, tensors: require_budget(options["budget"], experts, tensors),
        lambda options, experts, tensors: {
            "pieces": max(1, options["budget"] // (experts * tensors))
        },
        lambda options, shapes, coefficients, magnitudes: {
            "pieces": importance_pieces(shapes, coefficients, magnitudes, options["budget"])
        },
    )
}
"""Granularities that follow from coarse coefficients, by their names in a recipe."""
