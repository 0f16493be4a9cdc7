"""Coefficients of one size of a model family for another size: layers by their relative depth."""

from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float

from adamerge_jax.parameter_names import STACKED, place_in_stack, stack_depths, stack_of


def carry(
    per_tensor: Mapping[str, Float[np.ndarray, " K"]],
    depths: Mapping[str, int],
    tensors: Iterable[str],
) -> dict[str, Float[np.ndarray, " K"]]:
    """Returns coefficients for the tensors of one model, from those of a model of another size.

    Layer `i` of a stack of L takes after layer `round(i (L' - 1) / (L - 1))` of the stack of L' of
    the same name, so that the first takes after the first and the last after the last. Outside of
    stacks tensors take after those of the same name.

    Args:
        per_tensor: Coefficients of the other model, by names without `*`.
        depths: Number of layers of each stack of the other model; see `stack_depths`.
        tensors: Names of all tensors of the model, without `*`.

    Returns:
        By tensor of the model; those that the other model has no coefficients for are left out.
    """
    tensors = list(tensors)
    depths_here = stack_depths(tensors)
    carried = {}
    for name in tensors:
        twin = name
        if place := place_in_stack(name):
            stacked, layer = place
            stack = stack_of(stacked)
            if stack not in depths:
                continue
            # Halves up, as one learns it; Python's own round would go to the even layer.
            twin_layer = int(layer * (depths[stack] - 1) / max(depths_here[stack] - 1, 1) + 0.5)
            twin = stacked.replace(STACKED, str(twin_layer), 1)
        if twin in per_tensor:
            carried[name] = per_tensor[twin]
    return carried
