"""Arrays that are kept in memory while there is room, and made again where there is none."""

import numpy as np
from jaxtyping import Shaped


class ArrayCache:
    """Arrays by number, up to a size of all together; those that came first stay."""

    def __init__(self, most_bytes: int):
        """Makes room.

        Args:
            most_bytes: The size of all arrays together.
        """
        self._arrays: dict[int, np.ndarray] = {}
        self._free_bytes = most_bytes

    def __len__(self) -> int:
        return len(self._arrays)

    def get(self, number: int) -> Shaped[np.ndarray, "..."] | None:
        """Returns an array, or None if it is not here."""
        return self._arrays.get(number)

    def keep(self, number: int, array: Shaped[np.ndarray, "..."]) -> None:
        """Keeps an array if there is room."""
        if array.nbytes <= self._free_bytes:
            self._arrays[number] = array
            self._free_bytes -= array.nbytes
