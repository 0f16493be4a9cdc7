"""The interface of a representation of task vectors."""

from typing import Protocol

from jaxtyping import Array, Float, Int


class Delta(Protocol):
    """The deltas of K experts for one parameter, in any representation, as mixing uses them."""

    def weighted_sum(self, scale: Float[Array, "K ..."]) -> Float[Array, "..."]:
        """Returns `sum_k scale[k] * tau_k` in float32; `scale` broadcasts against `[K, *shape]`."""
        ...

    def product(
        self, x: Float[Array, "N n"], scale: Float[Array, "K ..."]
    ) -> Float[Array, "N m"] | None:
        """Returns `x @ weighted_sum(scale).T` without the sum; None where the sum is less work."""
        ...

    def rows(self, index: Int[Array, "..."]) -> "Delta | None":
        """Returns the deltas of `parameter[index]` alone; None where the scale has no rows.

        Pieces of a flattened parameter begin and end anywhere in a row.
        """
        ...


class LoadedDelta(Delta, Protocol):
    """Deltas as they come from checkpoints, as granularities use them.

    A scale for them is one number for each expert, row or column. A stacked parameter has a
    leading axis of length L until it is sliced. Of abstract arrays, `jax.ShapeDtypeStruct`, the
    deltas that are laid out anew are abstract too.
    """

    def in_pieces(self, pieces: int, *, stacked: bool, seed: int | None = None) -> Delta:
        """Returns the deltas for scales `[K, pieces, 1]`, one for each piece of the parameter.

        Args:
            pieces: Their number; all have one length, the last one perhaps less.
            stacked: True where there is a leading axis of layers.
            seed: Assigns entries to pieces at random, depending on it and the parameter's size
                alone; by default a piece is contiguous in the flattened parameter.
        """
        ...

    def by_direction(self, rank: int | None) -> Delta:
        """Returns the deltas for scales `[K, rank + 1]`: leading singular directions, the rest.

        Args:
            rank: Number of leading directions; None for all, without a rest.
        """
        ...

    def norms(self, *, stacked: bool) -> Float[Array, "... K"]:
        """Returns the Frobenius norm of each expert's delta, `[K]`, or `[L, K]` where stacked."""
        ...
