"""Which tensors get more coefficients than others: the ++ of Expert Merging."""

from collections.abc import Mapping
from math import prod

import numpy as np
from jaxtyping import Float

from adamerge_jax.coefficients.granularities import Shapes, can_be_split
from adamerge_jax.errors import InputError


def importance_pieces(
    shapes: Shapes,
    coefficients: Mapping[str, Float[np.ndarray, " K"]],
    magnitudes: Mapping[str, Float[np.ndarray, " K"]],
    budget: int,
) -> dict[str, int]:
    """How many pieces each tensor is cut into, by its importance.

    The importance of tensor t is

        s_t = c_t / sum(c) + m_t / sum(m) + p_t / sum(p)

    with `c_t` the mean over experts of its learned `|lambda|`, `m_t` the mean over experts of the
    norm `||tau||_2` of its task vectors, and `p_t` its number of entries. Every tensor starts as
    one piece. Again and again the one with the largest importance per piece, `s_t / n_t`, is cut
    twice as finely, as long as the budget lasts and the pieces stay of one size; unimportant
    tensors are never cut. (Zhang et al., 2025, score a layer by the same three quantities.)

    Args:
        shapes: Of the tensors, by names without `*`.
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
    score = sum(each / max(each.sum(), np.finfo(float).tiny) for each in quantities)
    pieces = np.ones(len(names), int)
    open_ = np.array([can_be_split(name, shapes[name]) for name in names])
    sizes = quantities[2].astype(int)
    while True:
        open_ &= (sizes % (2 * pieces) == 0) & (experts * (pieces.sum() + pieces) <= budget)
        if not open_.any():
            return dict(zip(names, pieces.tolist(), strict=True))
        pieces[np.argmax(np.where(open_, score / pieces, -1))] *= 2


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
