"""Sums over experts of arrays that are computed from each of them."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

_CHAIN = 16
"""The largest number of experts that are summed by a program of one addition for each of them."""


def sum_over_experts(
    of_expert: Callable[..., Float[Array, "..."]], *arrays: PyTree[Array]
) -> Float[Array, "..."]:
    """Returns the sum of a function of each expert's arrays, without keeping any of its results.

    Args:
        of_expert: The function; XLA fuses it with the sum into one pass over the arrays.
        arrays: Its arguments, `[K, ...]`.
    """
    experts = len(jax.tree.leaves(arrays)[0])
    if experts > _CHAIN:
        return jax.vmap(of_expert)(*arrays).sum(0)

    def at(k: int) -> Sequence[PyTree[Array]]:
        return jax.tree.map(lambda array: array[k], arrays)

    # Faster for few than a sum along an axis; but compiling takes time for each link of the chain.
    return functools.reduce(jnp.add, (of_expert(*at(k)) for k in range(experts)))


def gradients_of_scales(
    of_expert: Callable[..., Float[Array, "..."]],
    *arrays: Float[Array, "K ..."],
    cotangent: Float[Array, "..."],
    in_turn: bool,
) -> Float[Array, "K ..."]:
    """Returns the gradient of `sum_over_experts` by its last arrays, each expert's scale.

    Args:
        of_expert: The function of an expert.
        arrays: Its arguments, the scales last.
        cotangent: The gradient by the sum.
        in_turn: True for one expert after the other, so that no product is kept for each.
    """

    def of_scale(expert: tuple[Array, ...]) -> Array:
        *others, scale = expert
        _, transposed = jax.vjp(functools.partial(of_expert, *others), scale)
        return transposed(cotangent)[0]

    return jax.lax.map(of_scale, arrays) if in_turn else jax.vmap(of_scale)(arrays)
