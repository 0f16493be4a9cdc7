"""Values that can be merged: finite ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from adamerge_jax.errors import InputError

if TYPE_CHECKING:
    from adamerge_jax.checkpoints.huggingface import Checkpoint


def require_finite(array: np.ndarray, *, tensor: str, checkpoint: Checkpoint, role: str) -> None:
    """Refuses a tensor with NaN or infinite values: it would spoil the whole merge.

    Args:
        array: The tensor's values.
        tensor: The tensor's name, for the message.
        checkpoint: The checkpoint that it was read from, for the message.
        role: The role of the checkpoint, for the message: `base`, `expert 'trec'`.

    Raises:
        InputError: With the number of NaN and infinite values, and the index of the first one.
    """
    if _all_finite(array):
        return
    finite = np.isfinite(array)
    not_a_number = int(np.isnan(array).sum())
    infinite = int(array.size - finite.sum()) - not_a_number
    counts = [f"{not_a_number} NaN"] * (not_a_number > 0) + [f"{infinite} Inf"] * (infinite > 0)
    first = [int(index) for index in np.unravel_index(np.argmin(finite), array.shape)]
    raise InputError(
        f"{role} ({checkpoint.source}): {tensor} holds {' and '.join(counts)} among its "
        f"{array.size} values, the first at {first}; its training has probably diverged: use an "
        "earlier checkpoint of it, or leave it out"
    )


def _all_finite(array: np.ndarray) -> bool:
    """Returns False if a value is NaN or infinite."""
    if array.dtype not in (np.float16, ml_dtypes.bfloat16) or not array.size:
        return bool(np.isfinite(array).all())
    # As bits, finite magnitudes are those below infinity's: many times as fast in 16 bits.
    infinity = np.array(np.inf, array.dtype).view(np.uint16)
    return bool((array.view(np.uint16) & np.uint16(0x7FFF)).max() < infinity)
