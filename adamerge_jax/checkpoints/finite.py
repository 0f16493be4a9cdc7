"""Values that can be merged: those that are finite in float32, in which all sums are made."""

import ml_dtypes
import numpy as np

from adamerge_jax.errors import InputError

LARGEST = float(np.finfo(np.float32).max)
"""The largest finite number of float32."""


def is_number(value: object) -> bool:
    """Returns True for a number of a JSON file that is finite in float32; true is none."""
    is_numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return is_numeric and abs(value) <= LARGEST


def require_finite(array: np.ndarray, *, tensor: str, source: str, role: str) -> None:
    """Refuses a tensor with NaN or infinite values: it would spoil the whole merge.

    Args:
        array: The tensor's values.
        tensor: The tensor's name, for the message.
        source: The checkpoint that it was read from, for the message.
        role: The role of the checkpoint, for the message: `base`, `expert 'trec'`.

    Raises:
        InputError: With the number of NaN and infinite values, and the index of the first one.
    """
    if all_finite(array):
        return
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(np.float32))
    not_a_number = int(np.isnan(array).sum())
    infinite = int(array.size - finite.sum()) - not_a_number
    counts = [f"{not_a_number} NaN"] * (not_a_number > 0) + [f"{infinite} Inf"] * (infinite > 0)
    first = [int(index) for index in np.unravel_index(np.argmin(finite), array.shape)]
    raise InputError(
        f"{role} ({source}): {tensor} holds {' and '.join(counts)} among its "
        f"{array.size} values, the first at {first}; its training has probably diverged: use an "
        "earlier checkpoint of it, or leave it out"
    )


def narrowed(
    array: np.ndarray,
    dtype: np.dtype,
    *,
    tensor: str,
    source: str,
    role: str,
    field: str,
) -> np.ndarray:
    """Returns finite values in another dtype, and refuses those that are too large for it.

    Args:
        array: The values.
        dtype: The dtype to convert to; values of this dtype are returned as they are.
        tensor: The tensor's name, for the message.
        source: The checkpoint that it was read from, for the message.
        role: The role of the checkpoint, for the message.
        field: The field of the recipe that decides the dtype, for the message.

    Raises:
        InputError: With the largest value.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if not all_finite(converted):
        raise InputError(
            f"{role} ({source}): {tensor} has values of up to {magnitude(array):.3g}, "
            f"more than {np.dtype(dtype).name} holds; set {field} to bfloat16 or float32, or leave "
            "it out"
        )
    return converted


def all_finite(array: np.ndarray) -> bool:
    """Returns False if a value is NaN, infinite, or beyond what float32 holds."""
    if array.dtype in (np.float16, ml_dtypes.bfloat16) and array.size:
        # As bits, finite magnitudes are those below infinity's: many times as fast in 16 bits.
        infinity = np.array(np.inf, array.dtype).view(np.uint16)
        return bool((array.view(np.uint16) & np.uint16(0x7FFF)).max() < infinity)
    if array.dtype == np.float32 and np.isfinite(sum_of_squares(array)):
        return True
    if array.dtype == np.float64:
        return bool((np.abs(array) <= LARGEST).all())
    return bool(np.isfinite(array).all())


def sum_of_squares(array: np.ndarray) -> float:
    """Returns the sum of squares of a float32 array, in float32.

    It is finite only if all values are, and takes less time than to look at each of them. Squares
    may overflow or vanish where values do not.
    """
    flat = array.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dot(flat, flat))


def magnitude(array: np.ndarray) -> float:
    """Returns the largest magnitude, 0 for an array without values."""
    return float(np.abs(array.astype(np.float64)).max(initial=0))
