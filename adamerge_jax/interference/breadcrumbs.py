"""Model Breadcrumbs (Davari and Belilovsky, ECCV 2024): drop small entries and outliers."""

import numpy as np

from adamerge_jax.interference.step import Step


def drop_extremes(smallest: float = 0.85, largest: float = 0.01) -> Step:
    """Sets the smallest and the largest entries of each tensor of each expert to 0.

    The sparse masks of Model Breadcrumbs (Davari and Belilovsky, ECCV 2024, section 3). Of the n
    entries of a tensor the `smallest * n` with the smallest magnitude are dropped and the
    `largest * n` with the largest; entries as large as one that stays stay too. The authors' code
    counts in each row of a tensor, the paper in each layer.

    Args:
        smallest: Part of the entries to drop because they are small, from 0 and under 1.
        largest: Part of the entries to drop because they are large, from 0; together with
            `smallest` under 1.

    Raises:
        ValueError: An argument is outside of its range.

    Examples:
        >>> import numpy as np
        >>> from adamerge_jax.interference import drop_extremes
        >>> values = np.array([[9.0, -1.0, 2.0, -3.0]])  # [K, *shape], one expert
        >>> drop_extremes(smallest=0.25, largest=0.25).apply("weight", values, None).tolist()
        [[0.0, 0.0, 2.0, -3.0]]
    """
    for name, part in (("smallest", smallest), ("largest", largest)):
        if not 0 <= part < 1:
            raise ValueError(f"{name} is {part}, expected from 0 and under 1")
    if smallest + largest >= 1:
        raise ValueError(
            f"smallest and largest are {smallest} and {largest}, expected a sum under 1"
        )

    def apply(name: str, values: np.ndarray, fitted: None) -> np.ndarray:
        return np.stack([_without_extremes(delta, smallest, largest) for delta in values])

    return Step(apply)


def _without_extremes(delta: np.ndarray, smallest: float, largest: float) -> np.ndarray:
    """Returns one expert's task vector of one tensor, `[*shape]`, without its extremes."""
    magnitudes = np.abs(delta, dtype=np.float32)
    lowest = int(smallest * delta.size)
    highest = max(delta.size - int(largest * delta.size) - 1, lowest)
    ordered = np.partition(magnitudes.ravel(), (lowest, highest))
    stays = (magnitudes >= ordered[lowest]) & (magnitudes <= ordered[highest])
    return np.where(stays, delta, np.zeros((), delta.dtype))
