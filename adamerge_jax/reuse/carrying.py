"""Coefficients of one size of a model family for another size: layers by their relative depth."""

from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float

from adamerge_jax.names import STACKED, place_in_stack


def carry(
    per_tensor: Mapping[str, Float[np.ndarray, " K"]], tensors: Iterable[str]
) -> dict[str, Float[np.ndarray, " K"]]:
    """Finds for every tensor of one model the tensor of another that does the same job.

    Layer `i` of a stack of L takes after layer `round(i (L' - 1) / (L - 1))` of the stack of L' of
    the same name, so that the first takes after the first and the last after the last. Outside of
    stacks tensors are found by their names.

    Args:
        per_tensor: Coefficients of the other model, by names without `*`.
        tensors: Names of all tensors of the model, without `*`.

    Returns:
        By tensor of the model; those that the other model has no coefficients for are left out.
    """
    tensors = list(tensors)
    here, there = _depths(tensors), _depths(per_tensor)
    carried = {}
    for name in tensors:
        twin = name
        if place := place_in_stack(name):
            stacked, layer = place
            stack = _stack(stacked)
            if stack not in there:
                continue
            # Halves up, as one learns it; Python's own round would go to the even layer.
            twin_layer = int(layer * (there[stack] - 1) / max(here[stack] - 1, 1) + 0.5)
            twin = stacked.replace(STACKED, str(twin_layer), 1)
        if twin in per_tensor:
            carried[name] = per_tensor[twin]
    return carried


def _depths(tensors: Iterable[str]) -> dict[str, int]:
    """The number of layers of each stack."""
    depths: dict[str, int] = {}
    for name in tensors:
        if place := place_in_stack(name):
            stack = _stack(place[0])
            depths[stack] = max(depths.get(stack, 0), place[1] + 1)
    return depths


def _stack(stacked: str) -> str:
    """`encoder.layer.*` of `encoder.layer.*.output.dense.weight`."""
    return stacked.partition(STACKED)[0] + STACKED
