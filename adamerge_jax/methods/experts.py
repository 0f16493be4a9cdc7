"""Sums of task vectors with one weight for each expert."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adamerge_jax.coefficients.granularities import constant, shapes_of, task
from adamerge_jax.mixing import Mixture, materialize_compiled, mix
from adamerge_jax.task_vectors import Delta
from adamerge_jax.task_vectors.offload.streamed import of_layer


def weighted(
    base: Mapping[str, Array], deltas: Mapping[str, Delta], weights: Sequence[float]
) -> dict[str, Array | Mixture]:
    """Returns `theta_base + sum_k weights[k] * tau_k` for all parameters, as mixtures.

    Args:
        base: The parameters of the base by name.
        deltas: The task vectors of the K experts by parameter name.
        weights: The weight of each expert.
    """
    shapes = shapes_of(base, deltas)
    start = {
        name: values * 0 + np.asarray(weights, np.float32)
        for name, values in constant(shapes, len(weights), 0.0).items()
    }
    granularity = task(shapes)
    return mix(base, deltas, granularity.scales(granularity.init(start)))


def expert_parameters(
    base: Mapping[str, Array], deltas: Mapping[str, Delta], experts: int, expert: int
) -> dict[str, Array]:
    """Returns the parameters of one of K experts, `[*shape]` by name."""
    return materialize_compiled(weighted(base, deltas, one_hot(expert, experts)))


def average_of(
    base: Mapping[str, Array], deltas: Mapping[str, Delta], experts: int
) -> dict[str, Array]:
    """Returns the average of the experts in all parameters that they changed."""
    changed = {name: base[name] for name in deltas}
    return materialize_compiled(weighted(changed, deltas, mean(experts)))


def one_hot(expert: int, experts: int) -> np.ndarray:
    """Returns the weights `[K]` that are 1 for one expert and 0 for all others."""
    return np.eye(experts, dtype=np.float32)[expert]


def mean(experts: int) -> np.ndarray:
    """Returns the weights `[K]` of the average of K experts."""
    return np.full(experts, 1 / experts, np.float32)


def tensor_with(
    base: Mapping[str, Array],
    deltas: Mapping[str, Delta],
    name: str,
    number: int | None,
    weights: Float[np.ndarray, " K"],
) -> Float[Array, "..."]:
    """Returns `theta_base + sum_k weights[k] * tau_k` of one tensor, float32.

    Args:
        base: The parameters of the base by name.
        deltas: The task vectors of the experts by parameter name.
        name: The name of the parameter.
        number: The layer of a stacked parameter.
        weights: The weight of each expert.
    """
    tensor = base[name] if number is None else base[name][number]
    change = tensor_sum(deltas[name], weights, tensor.ndim, number)
    return tensor.astype(jnp.float32) + change


def set_tensor(
    parameter: Float[Array, "..."], number: int | None, values: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Returns a parameter with new values, or with those of one layer of a stacked one.

    A stacked parameter is overwritten.
    """
    if number is None:
        return values.astype(parameter.dtype)
    return _set_layer(parameter, values, number)


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(
    parameter: Float[Array, "L ..."], values: Float[Array, "..."], number: int
) -> Float[Array, "L ..."]:
    return parameter.at[number].set(values.astype(parameter.dtype))


def tensor_sum(
    delta: Delta, weights: Float[np.ndarray, " K"], axes: int, layer: int | None = None
) -> Float[Array, "..."]:
    """Returns `sum_k weights[k] * tau_k` of one tensor, float32.

    Args:
        delta: The task vectors of a parameter.
        weights: The weight of each expert.
        axes: The number of axes of the tensor.
        layer: The layer of a stacked parameter.
    """
    if layer is not None:
        delta = of_layer(delta, layer)
    return _weighted_sum(delta, jnp.asarray(weights, jnp.float32), axes)


@functools.partial(jax.jit, static_argnames="axes")
def _weighted_sum(delta: Delta, weights: Float[Array, " K"], axes: int) -> Float[Array, "..."]:
    return delta.weighted_sum(weights.reshape(-1, *(1 for _ in range(axes))))
