"""Task vectors of experts that have different representations."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from adamerge_jax.task_vectors.delta import Delta, LoadedDelta


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class JoinedDelta:
    """Deltas of some experts in one representation and of others in another.

    Attributes:
        parts: Deltas, each of some of the experts. An expert is in several parts where one layer
            of a stack has one representation and another layer another; each is 0 in the other's
            layers.
        experts: Experts of each part, as positions among all K.
        count: K.
    """

    parts: tuple[LoadedDelta, ...]
    experts: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})
    count: int = dataclasses.field(metadata={"static": True})

    def weighted_sum(self, scale: Float[Array, "K ..."]) -> Float[Array, "..."]:
        """Returns the sum of the parts' sums."""
        sums = [part.weighted_sum(scale) for part, scale in self._with_scales(scale)]
        return functools.reduce(jnp.add, sums)

    def product(
        self, x: Float[Array, "N n"], scale: Float[Array, "K ..."]
    ) -> Float[Array, "N m"] | None:
        """Returns the sum of the parts' products, or None where a part must be summed first."""
        products = [part.product(x, scale) for part, scale in self._with_scales(scale)]
        if any(product is None for product in products):
            return None
        return functools.reduce(jnp.add, products)

    def rows(self, index: Int[Array, "..."]) -> "JoinedDelta | None":
        """Returns the parts' rows, or None where a part has none."""
        rows = self._change(lambda part: part.rows(index))
        return None if any(part is None for part in rows.parts) else rows

    def in_pieces(self, pieces: int, *, stacked: bool, seed: int | None = None) -> "JoinedDelta":
        """Returns the parts in pieces."""
        return self._change(lambda part: part.in_pieces(pieces, stacked=stacked, seed=seed))

    def by_direction(self, rank: int | None) -> "JoinedDelta":
        """Returns the parts by singular direction."""
        return self._change(lambda part: part.by_direction(rank))

    def norms(self, *, stacked: bool) -> Float[Array, "... K"]:
        """Returns the norm of each expert's delta; in one layer, an expert is in one part only."""
        norms_of_parts = [part.norms(stacked=stacked) for part in self.parts]
        norms = jnp.zeros((*norms_of_parts[0].shape[:-1], self.count))
        for of_part, experts in zip(norms_of_parts, self.experts, strict=True):
            norms = norms.at[..., np.array(experts)].add(of_part)
        return norms

    def _with_scales(self, scale: Float[Array, "K ..."]) -> list[tuple[Delta, Array]]:
        with_experts = zip(self.parts, self.experts, strict=True)
        return [(part, scale[np.array(experts)]) for part, experts in with_experts]

    def _change(self, change: Callable[[LoadedDelta], Delta | None]) -> "JoinedDelta":
        return dataclasses.replace(self, parts=tuple(map(change, self.parts)))
