"""The gradient of a batch in parts, for which weights are mixed once.

    theta = theta_base + sum_k lambda_k tau_k          once a step
    g = sum over parts of d objective / d theta        part by part, in float32
    d objective / d lambda_k = <g, tau_k>              once a step

So task vectors are read twice a step, however many parts it has, where mixing in every part reads
them twice a part. That takes the memory of the merged model and of its gradient. Task vectors of
low rank are mixed in every part all the same: a layer's product with them needs no merged matrix.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from adamerge_jax.data.batches import Batch
from adamerge_jax.learning.microbatches import sum_over_parts
from adamerge_jax.mixing import (
    is_mixture,
    is_summed_once,
    materialize,
    mix,
    scale_gradient,
)
from adamerge_jax.parameter_names import is_stacked, leaf_name
from adamerge_jax.task_vectors import Delta

Scales = Mapping[str, Float[Array, "K ..."]]

Total = Callable[[PyTree, PyTree, Batch], tuple[Float[Array, ""], Any]]
"""`(parameters, heads, part) -> (objective, anything else that adds up)`."""


def gradient_mixed_once(
    total: Total,
    base: PyTree[Array],
    deltas: Mapping[str, Delta],
    scales: Scales,
    heads: PyTree[Array],
    batch: Batch,
    parts: int,
) -> tuple[tuple[Scales, PyTree[Array]], Any]:
    """Returns the gradient of a batch's objective by the scales and by heads.

    Args:
        total: The objective of a part, of parameters that may be mixtures.
        base: The parameters of the base, any pytree.
        deltas: The experts' deltas by parameter name.
        scales: The scale of each of them.
        heads: What is learned beside the scales.
        batch: The batch.
        parts: The number of its parts.

    Returns:
        The gradients by scales and by heads, and the sum of what else `total` returns.
    """
    with jax.named_scope("mix_once"):
        mixed = mix(base, deltas, scales)
        mixtures = {
            leaf_name(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(mixed, is_leaf=is_mixture)
            if is_mixture(leaf)
        }
        summed = {name: m for name, m in mixtures.items() if is_summed_once(m.delta)}
        weights = materialize(summed)
    low_rank = {name: scales[name] for name in mixtures if name not in summed}

    def parameters(weights: Mapping[str, Array], low_rank: Scales) -> PyTree:
        def leaf(path: tuple, parameter: Array) -> Any:
            return weights.get(leaf_name(path), parameter)

        lazy = mix(base, {name: deltas[name] for name in low_rank}, low_rank)
        return jax.tree_util.tree_map_with_path(leaf, lazy, is_leaf=is_mixture)

    def of_part(part: Batch) -> Any:
        def objective(learned: tuple[Mapping[str, Array], Scales, PyTree]) -> Any:
            weights, low_rank, heads = learned
            return total(parameters(weights, low_rank), heads, part)

        gradient, rest = jax.grad(objective, has_aux=True)((weights, low_rank, heads))
        # Many parts in half precision would round each other away.
        return jax.tree.map(lambda array: array.astype(jnp.float32), gradient), rest

    (of_weights, of_low_rank, of_heads), rest = sum_over_parts(of_part, batch, parts)
    with jax.named_scope("contract_once"):
        of_summed = {
            name: scale_gradient(mixture, of_weights[name], stacked=is_stacked(name))
            for name, mixture in summed.items()
        }
    return ({**of_summed, **of_low_rank}, of_heads), rest
