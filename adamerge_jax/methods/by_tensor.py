"""Merge methods that compute each tensor of the merge from its entries alone."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adamerge_jax.interference import FittedStep
from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.parameter_names import is_stacked, unstack
from adamerge_jax.task_vectors import Delta, DenseDelta, JoinedDelta, LowRankDelta
from adamerge_jax.task_vectors.offload.streamed import of_layer


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of the base, and the changes that K experts made to it.

    Attributes:
        name: The tensor's name in a checkpoint, without `*`.
        base: The base's values, `[*shape]`, float32.
        delta: The task vectors in their representation.
        experts: K.
    """

    name: str
    base: Float[Array, "..."]
    delta: Delta
    experts: int

    @functools.cached_property
    def deltas(self) -> Float[Array, "K ..."]:
        """The task vectors entry by entry, `[K, *shape]`, float32."""
        return _entries(self.delta, jnp.eye(self.experts), self.base.ndim)

    @functools.cached_property
    def factors(self) -> LowRankDelta | None:
        """The task vectors as factors, float32; None where an expert's are entry by entry."""
        return _factors(self.delta, self.experts)


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
        return (wide + merged_delta(Tensor(name, wide, delta, experts))).astype(base.dtype)

    def merge(
        base: Mapping[str, Array], deltas: Mapping[str, Delta], experts: int
    ) -> dict[str, Array]:
        merged = {}
        for name, delta in deltas.items():
            if not is_stacked(name):
                merged[name] = merge_one(name, base[name], delta, experts)
                continue
            layers = [
                merge_one(tensor, base[name][layer], of_layer(delta, layer), experts)
                for layer, tensor in enumerate(unstack(name, len(base[name])))
            ]
            merged[name] = jnp.stack(layers)
        return merged

    return MergeMethod(merge, tuple(interference))


@functools.partial(jax.jit, static_argnames="axes")
def _entries(delta: Delta, experts: Float[Array, "K K"], axes: int) -> Float[Array, "K ..."]:
    """Returns the entries of each expert's delta, whatever its representation."""
    scales = experts.reshape(*experts.shape, *(1 for _ in range(axes)))
    return jax.lax.map(delta.weighted_sum, scales)


def _factors(delta: Delta, experts: int) -> LowRankDelta | None:
    """Returns factors of all experts, with zeros for experts that do not change the tensor."""
    if isinstance(delta, LowRankDelta):
        return LowRankDelta(delta.left.astype(jnp.float32), delta.right.astype(jnp.float32))
    if not isinstance(delta, JoinedDelta):
        return None
    parts: list[tuple[LowRankDelta, np.ndarray]] = []
    for part, positions in zip(delta.parts, delta.experts, strict=True):
        if isinstance(part, LowRankDelta):
            parts.append((part, np.array(positions)))
        # A stack has zeros of an expert that is whole in another of its layers.
        elif not isinstance(part, DenseDelta) or jnp.any(part.values):
            return None
    if not parts:
        return None
    first = parts[0][0]
    rank = max(part.left.shape[-1] for part, _ in parts)
    left = jnp.zeros((experts, first.left.shape[1], rank))
    right = jnp.zeros((experts, rank, first.right.shape[2]))
    for factors, positions in parts:
        size = factors.left.shape[-1]
        left = left.at[positions, :, :size].set(factors.left)
        right = right.at[positions, :size].set(factors.right)
    return LowRankDelta(left, right)
