"""Task vectors with a coefficient for each row and one for each column."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adamerge_jax.task_vectors.delta import Delta, LoadedDelta
from adamerge_jax.task_vectors.low_rank import LowRankDelta
from adamerge_jax.task_vectors.offload.streamed import StreamedDelta


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowColumnDelta:
    """Deltas of a matrix whose entries have the mean of their row's and their column's coefficient.

    Attributes:
        delta: The deltas, `[K, m, n]`, in a representation for scales by row and by column.
        height: m, the number of rows.

    A stacked parameter has a leading axis of length L on all arrays until it is sliced.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax import DenseDelta
        >>> from adamerge_jax.task_vectors import RowColumnDelta
        >>> delta = RowColumnDelta(DenseDelta(jnp.ones((1, 2, 3))), height=2)
        >>> scale = jnp.array([[0.0, 1.0, 0.0, 0.5, 1.0]])  # of two rows and three columns
        >>> delta.weighted_sum(scale).tolist()
        [[0.0, 0.25, 0.5], [0.5, 0.75, 1.0]]
    """

    delta: Delta
    height: int = dataclasses.field(metadata={"static": True})

    def weighted_sum(self, scale: Float[Array, "K m+n"]) -> Float[Array, "m n"]:
        """Returns `sum_k (diag(row_k) tau_k + tau_k diag(column_k)) / 2`."""
        by_row, by_column = self._halves(scale)
        return self.delta.weighted_sum(by_row) + self.delta.weighted_sum(by_column)

    def product(
        self, x: Float[Array, "N n"], scale: Float[Array, "K m+n"]
    ) -> Float[Array, "N m"] | None:
        """Returns the product through the narrow middle, or None where the sum is less work."""
        by_row, by_column = self._halves(scale)
        with_rows = self.delta.product(x, by_row)
        with_columns = self.delta.product(x, by_column)
        if with_rows is None or with_columns is None:
            return None
        return with_rows + with_columns

    def rows(self, index: Int[Array, "..."]) -> None:
        """Returns None: the scale is not of rows alone, so that the merged weights are summed."""
        return None

    def scaled(
        self, scale: Float[Array, "K m+n"]
    ) -> tuple[Float[Array, "m 2Kr"], Float[Array, "2Kr n"]]:
        """Returns the factors of the weighted sum, where the deltas are of low rank."""
        assert isinstance(self.delta, LowRankDelta)
        both = [self.delta.scaled(half) for half in self._halves(scale)]
        (left_by_row, right), (left, right_by_column) = both
        return jnp.concatenate([left_by_row, left], 1), jnp.concatenate([right, right_by_column])

    def _halves(
        self, scale: Float[Array, "K m+n"]
    ) -> tuple[Float[Array, "K m 1"], Float[Array, "K 1 n"]]:
        half = scale.astype(jnp.float32) / 2
        return half[:, : self.height, None], half[:, None, self.height :]


def by_row_and_column(delta: LoadedDelta, height: int) -> Delta:
    """Returns deltas for scales `[K, m + n]`, a number for each row and then for each column.

    Args:
        delta: The deltas of a matrix `[m, n]`.
        height: m.
    """
    if isinstance(delta, StreamedDelta):
        # One expert at a time is scaled by both, so that it comes to the device once.
        return delta.laid_out(lambda loaded: RowColumnDelta(loaded, height))
    return RowColumnDelta(delta, height)
