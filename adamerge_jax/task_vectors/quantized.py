"""Task vectors as integers of 8 or 4 bits, with a step for each row or for 64 entries of it."""

import dataclasses
from collections.abc import Iterator
from types import EllipsisType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from adamerge_jax.errors import InputError
from adamerge_jax.task_vectors.entries import Entries
from adamerge_jax.task_vectors.expert_sums import gradients_of_scales, sum_over_experts

GROUP = 64
"""Entries of a row that share a step in 4 bits, where rows are a multiple of them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedDelta:
    """Deltas rounded to multiples of a step: `tau_k ~ values_k * steps_k`, off by half a step.

    A matrix, or what has more axes, has one step for each row (entries of one output unit), the
    127th part of the row's largest entry; in 4 bits one for each `GROUP` entries of a row of a
    matrix, the 7th part of the largest. A vector has one step for all of it.

    Attributes:
        values: `[K, *shape]`, int8 or int4.
        steps: `[K, m, 1, ...]`, or `[K, 1]` for a vector, or `[K, m, n / GROUP]`.

    A stacked parameter has a leading axis of length L on both.
    """

    values: Int[Array, "K ..."]
    steps: Float[Array, "K ..."]

    def weighted_sum(self, scale: Float[Array, "K ..."]) -> Float[Array, "..."]:
        """Returns `sum_k (scale[k] * steps[k]) * values[k]`, in float32.

        No expert's delta is kept as floating point, neither now nor for the backward pass.
        """
        return _weighted_sum(self, scale.astype(jnp.float32))

    def product(self, x: Float[Array, "N n"], scale: Float[Array, "K ..."]) -> None:
        """Returns None: one product with the merged weights is less than one for each expert."""
        return None

    def rows(self, index: Int[Array, "..."]) -> "QuantizedDelta":
        """Returns the deltas of `parameter[index]`, each row with its own step."""
        steps = self.steps
        if steps.ndim > 2:
            steps = jnp.take(steps, index, axis=1)
        return QuantizedDelta(jnp.take(self.values, index, axis=1), steps)

    def in_pieces(self, pieces: int, *, stacked: bool, seed: int | None = None) -> None:
        """Refuses pieces, which would lie across rows that have steps of their own.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"task_vectors.dtype: {self.values.dtype} has a step for each row, and this "
            "granularity cuts across rows; take row, column, row_column, head, tensor or a coarser "
            "one, or bfloat16 task vectors"
        )

    def by_direction(self, rank: int | None) -> None:
        """Refuses singular directions, which would be floating point again.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"task_vectors.dtype: {self.values.dtype} does not go with singular directions, which "
            "are floating point; take another granularity, or bfloat16 task vectors"
        )

    def norms(self, *, stacked: bool) -> Float[Array, "... K"]:
        """Returns the Frobenius norm of each expert's rounded delta."""
        leading = self.values.shape[: 1 + stacked]
        deltas = _restored(jnp.asarray(self.values), jnp.asarray(self.steps))
        return jnp.linalg.norm(deltas.reshape(*leading, -1), axis=-1)


def _restored(values: Int[Array, "..."], steps: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns integers times their steps, in float32."""
    wide, groups = values.astype(jnp.float32), steps.shape[-1]
    if groups in (1, values.shape[-1]):
        return wide * steps
    grouped = wide.reshape(*values.shape[:-1], groups, -1)
    return (grouped * steps[..., None]).reshape(values.shape)


def _of_expert(
    values: Int[Array, "..."], steps: Float[Array, "..."], scale: Float[Array, "..."]
) -> Float[Array, "..."]:
    if steps.shape[-1] == 1:
        return (scale * steps) * values.astype(jnp.float32)
    return scale * _restored(values, steps)


@jax.custom_vjp
def _weighted_sum(delta: QuantizedDelta, scale: Float[Array, "K ..."]) -> Float[Array, "..."]:
    return sum_over_experts(_of_expert, delta.values, delta.steps, scale)


def _forward(
    delta: QuantizedDelta, scale: Float[Array, "K ..."]
) -> tuple[Float[Array, "..."], tuple[QuantizedDelta, Float[Array, "K ..."]]]:
    return _weighted_sum(delta, scale), (delta, scale)


def _backward(
    residuals: tuple[QuantizedDelta, Float[Array, "K ..."]], cotangent: Float[Array, "..."]
) -> tuple[None, Float[Array, "K ..."]]:
    delta, scale = residuals
    return None, gradients_of_scales(
        _of_expert, delta.values, delta.steps, scale, cotangent=cotangent, in_turn=True
    )


_weighted_sum.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class QuantizedEntries:
    """Entries that are filled one expert and one tensor at a time, and rounded as they come.

    Attributes:
        values: `[..., *shape]`, int8 or int4.
        steps: `[..., m, 1, ...]`, `[..., 1]` or `[..., m, n / GROUP]`, float32.
    """

    values: Entries
    steps: Entries

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values that are rounded to integers."""
        return np.dtype(np.float32)

    @staticmethod
    def steps_shape(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
        """Returns the shape of a parameter's steps, with integers of the given dtype."""
        if _bits(dtype) == 4 and len(shape) == 2 and shape[1] % GROUP == 0:
            return shape[0], shape[1] // GROUP
        return (shape[0], *(1 for _ in shape[1:])) if len(shape) > 1 else (1,) * len(shape)

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator["QuantizedEntries"]:
        for values, steps in zip(self.values, self.steps, strict=True):
            yield QuantizedEntries(values, steps)

    def __setitem__(self, where: EllipsisType, deltas: Float[np.ndarray, "..."] | int) -> None:
        self.values[...], self.steps[...] = quantize(
            np.broadcast_to(np.asarray(deltas, np.float32), self.values.shape),
            self.values.dtype,
        )


def quantize(
    delta: Float[np.ndarray, "*shape"], dtype: np.dtype
) -> tuple[Int[np.ndarray, "*shape"], Float[np.ndarray, "..."]]:
    """Returns one expert's delta of one parameter as integers and steps; see `QuantizedDelta`.

    Args:
        delta: The delta.
        dtype: int8 or int4.
    """
    # The smallest integer is not used, so that a delta and its negative are alike.
    highest = 2 ** (_bits(dtype) - 1) - 1
    shape = QuantizedEntries.steps_shape(delta.shape, dtype)
    is_grouped = len(shape) == 2 and shape[1] > 1
    grouped = delta.reshape(*shape, GROUP) if is_grouped else delta
    axes = tuple(range(len(shape), grouped.ndim)) if is_grouped else tuple(range(1, delta.ndim))
    largest = np.abs(grouped).max(axes or None, keepdims=True, initial=0)
    steps = (largest / highest).astype(np.float32)
    values = np.divide(grouped, steps, out=np.zeros(grouped.shape, np.float32), where=steps > 0)
    np.rint(values, out=values)
    np.clip(values, -highest, highest, out=values)
    return values.astype(dtype).reshape(delta.shape), steps.reshape(shape)


def _bits(dtype: np.dtype) -> int:
    return jnp.iinfo(dtype).bits
