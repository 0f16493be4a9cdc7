"""The protocol of a merge with nothing to learn."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from adamerge_jax.interference import FittedStep
from adamerge_jax.mixing import Mixture, least_variance, materialize_compiled
from adamerge_jax.parameter_names import is_stacked, is_variance
from adamerge_jax.statistics import Statistics
from adamerge_jax.task_vectors import Delta


class MergeMethod(NamedTuple):
    """A merge with nothing to learn.

    Attributes:
        merge: The function `(base, deltas, K) -> merged`, with dictionaries by parameter name (also
            of stacked parameters): the base's parameters `[*shape]`, the task vectors of K experts,
            and for each task vector the merged parameter `[*shape]` or a `Mixture` that becomes it.
            It may be called for all parameters at once or for one after the other. With
            `needs_data` it is called for all at once, with `Statistics` as a fourth argument, and
            asks them for what it needs of the calibration data.
        interference: The steps that change the task vectors first.
        needs_data: True for a method that needs calibration data.
        needs_predictions: True for one that asks for Fisher information or losses, which only
            models of classes or tokens have.
    """

    merge: Callable[..., Mapping[str, Array | Mixture]]
    interference: tuple[FittedStep, ...] = ()
    needs_data: bool = False
    needs_predictions: bool = False


def merged_parameters(
    method: MergeMethod,
    base: Mapping[str, Array],
    deltas: Mapping[str, Delta],
    experts: int,
    statistics: Statistics | None = None,
) -> dict[str, Array]:
    """Merges all parameters that experts changed; the others stay the base's.

    Args:
        method: The method; its interference steps have changed `deltas` already.
        base: The parameters of the base by name.
        deltas: The task vectors of the K experts by parameter name.
        experts: The number of experts, K.
        statistics: The calibration data, for a method that needs it.

    Returns:
        The merged model's parameters by name, `[*shape]`, in the dtype of the base.

    Raises:
        ValueError: The method needs calibration data, and there is none.
    """
    if method.needs_data and statistics is None:
        raise ValueError("the method needs calibration data: give its statistics")
    data = (statistics,) if method.needs_data else ()
    merged = materialize_compiled({**base, **method.merge(base, deltas, experts, *data)})
    return merged | {
        name: _not_below(merged[name], base[name], deltas[name], experts, is_stacked(name))
        for name in filter(is_variance, deltas)
    }


@partial(jax.jit, static_argnums=(3, 4))
def _not_below(merged: Array, base: Array, delta: Delta, experts: int, stacked: bool) -> Array:
    """Returns merged variances, none of which is less than the least of all models."""

    def of_one(arrays: tuple[Array, Array, Delta]) -> Array:
        merged, base, delta = arrays
        scale = jnp.zeros((experts, *(1 for _ in base.shape)))
        smallest = least_variance(base.astype(jnp.float32), delta, scale)
        return jnp.maximum(merged, smallest.astype(merged.dtype))

    arrays = (merged, base, delta)
    return jax.lax.map(of_one, arrays) if stacked else of_one(arrays)
