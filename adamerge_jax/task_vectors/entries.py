"""Arrays that deltas are written to while checkpoints are read."""

from collections.abc import Iterator
from types import EllipsisType
from typing import Protocol

from jaxtyping import Float
from numpy import dtype, ndarray


class Entries(Protocol):
    """An array that is filled part by part: one of NumPy, or one that puts its parts elsewhere.

    Attributes:
        shape: Its shape.
        dtype: The dtype of the values that it is filled with.
    """

    shape: tuple[int, ...]
    dtype: dtype

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator["Entries"]:
        """Yields its parts along the first axis; to write into one is to write into the whole."""
        ...

    def __setitem__(self, where: EllipsisType, values: Float[ndarray, "..."] | int) -> None:
        """Fills it."""
        ...
