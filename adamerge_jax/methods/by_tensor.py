"""Merge methods that compute each tensor of the merge from its entries alone."""

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adamerge_jax.interference import FittedStep
from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.parameter_names import is_stacked, unstack
from adamerge_jax.task_vectors import Delta
from adamerge_jax.task_vectors.offload.streamed import apart_from_layers, with_sources


class Tensor(NamedTuple):
    """One tensor of the base, and the changes that K experts made to it.

    Attributes:
        name: The tensor's name in a checkpoint, without `*`.
        base: The base's values, `[*shape]`, float32.
        deltas: The task vectors, `[K, *shape]`, float32.
    """

    name: str
    base: Float[Array, "..."]
    deltas: Float[Array, "K ..."]


def by_tensor(
    merged_delta: Callable[[Tensor], Float[Array, "..."]],
    interference: Sequence[FittedStep] = (),
) -> MergeMethod:
    """Returns the method `theta_base + merged_delta(tensor)` for each tensor by itself.

    Layers of a stacked parameter are merged one after the other, so that the entries of all
    experts exist for one tensor at a time.

    Args:
        merged_delta: A pure function of one tensor to the merged task vector, `[*shape]`; it is
            called outside of compiled functions.
        interference: The steps that change the task vectors first.
    """

    def merge_one(name: str, base: Array, delta: Delta, experts: int) -> Array:
        wide = base.astype(jnp.float32)
        tensor = Tensor(name, wide, _entries(delta, jnp.eye(experts), wide.ndim))
        return (wide + merged_delta(tensor)).astype(base.dtype)

    def merge(
        base: Mapping[str, Array], deltas: Mapping[str, Delta], experts: int
    ) -> dict[str, Array]:
        merged = {}
        for name, delta in deltas.items():
            if not is_stacked(name):
                merged[name] = merge_one(name, base[name], delta, experts)
                continue
            layers = [
                merge_one(tensor, layer_base, layer_delta, experts)
                for tensor, layer_base, layer_delta in zip(
                    unstack(name, len(base[name])),
                    base[name],
                    _layers(delta, len(base[name])),
                    strict=True,
                )
            ]
            merged[name] = jnp.stack(layers)
        return merged

    return MergeMethod(merge, tuple(interference))


@functools.partial(jax.jit, static_argnames="axes")
def _entries(delta: Delta, experts: Float[Array, "K K"], axes: int) -> Float[Array, "K ..."]:
    """Returns the entries of each expert's delta, whatever its representation."""
    scales = experts.reshape(*experts.shape, *(1 for _ in range(axes)))
    return jax.lax.map(delta.weighted_sum, scales)


def _layers(delta: Delta, count: int) -> Iterator[Delta]:
    """Yields the delta of each layer of a stacked parameter."""
    stacked, sources = apart_from_layers(delta)
    for layer in range(count):
        yield with_sources(jax.tree.map(operator.itemgetter(layer), stacked), sources)
