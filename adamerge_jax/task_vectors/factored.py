"""Task vectors as singular directions with a coefficient each."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adamerge_jax.task_vectors.delta import Delta


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FactoredDelta:
    """Deltas of a matrix as their leading singular directions and the rest.

    Attributes:
        left: `[K, m, r]`, left singular vectors times singular values.
        right: `[K, r, n]`, right singular vectors.
        rest: Deltas beyond rank r, or None where there are none, or rounding, for all experts.

    A stacked parameter has a leading axis of length L on all of them.
    """

    left: Float[Array, "K m r"]
    right: Float[Array, "K r n"]
    rest: Delta | None

    def weighted_sum(self, scale: Float[Array, "K r+1"]) -> Float[Array, "m n"]:
        """Returns the sum over experts and directions; the last coefficient is that of the rest.

        Without a rest, coefficients of directions that factors do not have change nothing.
        """
        scale = scale.astype(jnp.float32)
        rank = self.left.shape[-1]
        summed = jnp.einsum(
            "kmr,krn->mn",
            self.left * scale[:, None, :rank],
            self.right,
            precision=jax.lax.Precision.HIGHEST,
        )
        if self.rest is None:
            return summed
        return summed + self.rest.weighted_sum(scale[:, rank, None, None])

    def product(self, x: Float[Array, "N n"], scale: Float[Array, "K r+1"]) -> None:
        """Returns None: the merged weights are summed first."""
        return None

    def rows(self, index: Int[Array, "..."]) -> "FactoredDelta":
        """Raises NotImplementedError: tables that are read by rows are never factored."""
        raise NotImplementedError("rows of a factored parameter; embedding tables stay whole")
