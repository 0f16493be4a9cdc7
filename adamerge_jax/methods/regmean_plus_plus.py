"""RegMean++ (Nguyen et al., 2025): RegMean on what the merged layers before each layer give it."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Array, Float

from adamerge_jax.methods.experts import average_of, mean, one_hot, set_tensor, tensor_with
from adamerge_jax.methods.least_squares import (
    Chunk,
    Fit,
    grams_of,
    linear_layers,
    require_fraction,
    scaled,
)
from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.parameter_names import is_stacked, stack_of
from adamerge_jax.statistics import Layer, Statistics
from adamerge_jax.task_vectors import Delta


def regmean_plus_plus(off_diagonal: float = 0.9) -> MergeMethod:
    """Returns RegMean's fit with inputs that come from the merged model, layer by layer.

    `W = (sum_k W_k G_k) (sum_k G_k)^-1` as in `regmean`, but `G_k` is that of the inputs in layer l
    of expert k when the layers before it are the merged ones. All other parameters are averaged.

    Each layer is one forward pass of the whole model for each expert. Held are the merged model,
    and the Gram matrices of one layer.

    Args:
        off_diagonal: The factor of Gram matrices' entries off the diagonal, from 0 to 1.

    Source: Nguyen et al., "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean
    for Model Merging", 2025, section 3. The authors' code merges only the weights in the stack of
    layers; here those after it, such as a pooler, are fitted too.

    Raises:
        ValueError: The factor is not from 0 to 1.
    """
    require_fraction("off_diagonal", off_diagonal)

    def merge(
        base: Mapping[str, Array],
        deltas: Mapping[str, Delta],
        experts: int,
        statistics: Statistics,
    ) -> dict[str, Array]:
        merged = {**base, **average_of(base, deltas, experts)}

        def set_layer(layer: Layer, weights: Float[np.ndarray, " K"]) -> None:
            """Gives all tensors of a stack's layer their weighted sums."""
            for name in deltas:
                if is_stacked(name) and stack_of(name) == layer.stack:
                    tensor = tensor_with(base, deltas, name, layer.number, weights)
                    merged[name] = set_tensor(merged[name], layer.number, tensor)

        layers = linear_layers(statistics, base, deltas)
        statistics.announce(len(layers) * experts)
        for layer in layers:
            chunk: Chunk = {name: [layer.number] for name in layer.names}
            fits = {name: Fit(deltas[name], experts, layer.number) for name in layer.names}
            for expert in range(experts):
                set_layer(layer, one_hot(expert, experts))
                grams = grams_of(statistics, expert, merged, chunk)
                for name, fit in fits.items():
                    fit.add(expert, scaled(grams[name, layer.number], off_diagonal))
            set_layer(layer, mean(experts))
            for name, fit in fits.items():
                average = tensor_with(base, deltas, name, layer.number, mean(experts))
                fitted = average + fit.solve()
                merged[name] = set_tensor(merged[name], layer.number, fitted)
        return {name: merged[name] for name in deltas}

    return MergeMethod(merge, needs_data=True)
