"""TALL masks and their consensus (Wang et al., ICML 2024)."""

import numpy as np

from adamerge_jax.interference.step import Step


def tall_mask(threshold: float = 0.4) -> Step:
    """Keeps the entries that localise each expert's task in the sum of the task vectors.

    The mask of TALL-masks (Wang et al., ICML 2024, section 4.1) of expert k is

        |tau_k| >= threshold * |sum_j tau_j - tau_k|

    Args:
        threshold: The paper's lambda, which it chooses among 0.2 to 0.6; from 0.

    Raises:
        ValueError: The threshold is under 0 or not finite.

    Examples:
        >>> import numpy as np
        >>> from adamerge_jax.interference import tall_mask
        >>> tall_mask(threshold=0.5).apply("a", np.array([[4.0, 1.0], [1.0, 3.0]]), None).tolist()
        [[4.0, 0.0], [0.0, 3.0]]
    """
    _require_threshold(threshold)

    def apply(name: str, values: np.ndarray, fitted: None) -> np.ndarray:
        total = values.sum(0, dtype=np.float32)
        masks = np.stack([_mask(delta, total, threshold) for delta in values])
        return np.where(masks, values, np.zeros((), values.dtype))

    return Step(apply)


def consensus_mask(threshold: float = 0.4, users: int = 2) -> Step:
    """Keeps the entries of all experts that are in the TALL masks of several of them.

    The mask of Consensus Merging (Wang et al., ICML 2024, section 4.3): an entry is dropped from
    all task vectors if it is in the masks (see `tall_mask`) of fewer than `users` experts, which
    are its selfish and catastrophic weights.

    Args:
        threshold: The paper's lambda of the masks, from 0.
        users: The paper's k: the number of masks that an entry has to be in, at least 1. With
            fewer experts than that: all of them.

    Raises:
        ValueError: An argument is outside of its range.

    Examples:
        >>> import numpy as np
        >>> from adamerge_jax.interference import consensus_mask
        >>> values = np.array([[4.0, 2.0], [1.0, 3.0]])  # [K, *shape]
        >>> consensus_mask(threshold=0.5, users=2).apply("weight", values, None).tolist()
        [[0.0, 2.0], [0.0, 3.0]]
    """
    _require_threshold(threshold)
    if not isinstance(users, int) or users < 1:
        raise ValueError(f"users is {users}, expected a whole number, at least 1")

    def apply(name: str, values: np.ndarray, fitted: None) -> np.ndarray:
        total = values.sum(0, dtype=np.float32)
        count = sum(_mask(delta, total, threshold).astype(np.int32) for delta in values)
        return np.where(count >= min(users, len(values)), values, np.zeros((), values.dtype))

    return Step(apply)


def _mask(delta: np.ndarray, total: np.ndarray, threshold: float) -> np.ndarray:
    """Returns the TALL mask of one expert's task vector, `[*shape]`."""
    others = np.abs(total - delta)
    return np.abs(delta, dtype=np.float32) >= np.float32(threshold) * others


def _require_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1e6:
        raise ValueError(f"threshold is {threshold}, expected from 0 to 1e6")
