"""The merge of whole experts straight from their files: block by block, in float32.

Only the result is as large as a tensor. A block of the base and of every expert is read, summed
while it lies in the processor's cache, and rounded once; a few threads do so side by side, so that
disk and processor both have work. The sums are those of `Mixture.materialize` on a `DenseDelta`,
without a compilation for every shape and without float32 copies of whole tensors.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np
from jaxtyping import Float

from adamerge_jax.checkpoints.finite import all_finite
from adamerge_jax.checkpoints.matching import MatchedCheckpoint
from adamerge_jax.errors import InputError
from adamerge_jax.parameter_names import is_variance

_BLOCK_ENTRIES = 2**18
"""Entries of a block: few enough that float32 copies stay in the processor's cache, and so many
that the threads seldom wait for Python."""

THREADS = 4
"""Threads that fold blocks side by side; more of them only wait for memory."""


def fold_tensor(
    name: str,
    base: MatchedCheckpoint,
    experts: Sequence[MatchedCheckpoint],
    scale: Float[np.ndarray, "K ..."],
    threads: ThreadPoolExecutor,
    dtype: np.dtype | None = None,
) -> Float[np.ndarray, "..."]:
    """Computes `theta_base + sum_k scale_k * (theta_k - theta_base)` for one tensor.

    Variances of batch normalisation are not less than the least of all models.

    Args:
        name: The name of the tensor, which the base and all experts have.
        base: The base.
        experts: K whole models.
        scale: The coefficients, which broadcast against `[K, *shape]`.
        threads: The threads that fold the blocks.
        dtype: The dtype of the merged tensor, by default the base's.

    Returns:
        The merged tensor, `[*shape]`; it is summed in float32 and rounded once.

    Raises:
        InputError: A value of the base or of an expert is NaN or infinite, or a merged one is more
            than the dtype holds.
    """
    shape = base.shape(name)
    merged = np.empty(shape, dtype or base.dtype(name))
    # Blocks are of entries where all have the same coefficients, else of whole rows.
    if scale.size == len(scale):
        rows, scale = merged.reshape(-1, 1), scale.reshape(len(scale), 1, 1)
    else:
        rows, scale = merged.reshape(shape[0], -1), _by_rows(scale, shape)
    height = max(1, _BLOCK_ENTRIES // max(1, rows.shape[1]))

    def fold_block(first: int) -> bool:
        part = slice(first, first + height)
        block_scale = scale if scale.shape[1] == 1 else scale[:, part]
        start = first * rows.shape[1]
        return _fold_block(name, base, experts, start, block_scale, rows[part])

    blocks = range(0, len(rows), height)
    run = threads.map if len(blocks) > 1 else map
    if not all(list(run(fold_block, blocks))):
        # A NaN or infinite value makes the sum so, whatever its coefficient; reading the whole
        # tensor reports its place.
        for checkpoint in (base, *experts):
            checkpoint.read(name)
        raise overflow_error(name, merged.dtype)
    return merged


def overflow_error(name: str, dtype: np.dtype) -> InputError:
    """Returns the error about a merged tensor whose values are more than its dtype holds."""
    return InputError(
        f"the merge of {name} has values that are more than {dtype.name} holds, although those of "
        "all models are finite; take smaller coefficients, or set export.dtype to bfloat16 or "
        "float32"
    )


def _fold_block(
    name: str,
    base: MatchedCheckpoint,
    experts: Sequence[MatchedCheckpoint],
    first: int,
    scale: Float[np.ndarray, " K #rows #columns"],
    out: Float[np.ndarray, "rows columns"],
) -> bool:
    """Folds the entries from `first` on into `out`; returns True if all of them are finite."""
    base_block = _read_block(base, name, first, out.shape)
    total = np.zeros(out.shape, np.float32)
    smallest = base_block
    # Values that are not finite are reported at the end, with names.
    with np.errstate(invalid="ignore", over="ignore"):
        for expert, expert_scale in zip(experts, scale, strict=True):
            delta = _read_block(expert, name, first, out.shape)
            np.subtract(delta, base_block, out=delta)
            if is_variance(name):
                smallest = np.minimum(smallest, base_block + delta)
            np.multiply(delta, expert_scale, out=delta)
            np.add(total, delta, out=total)
        np.add(base_block, total, out=total)
        if is_variance(name):
            np.maximum(total, smallest, out=total)
        out[...] = total
    return all_finite(total) and (out.dtype == total.dtype or all_finite(out))


def _read_block(
    model: MatchedCheckpoint, name: str, first: int, shape: tuple[int, ...]
) -> Float[np.ndarray, "rows columns"]:
    """Reads the entries of a tensor from `first` on as float32."""
    in_file = model.names[name]
    stored = np.empty(shape, model.checkpoint.tensors[in_file].dtype)
    model.checkpoint.read_part(in_file, first, stored.reshape(-1))
    return stored.astype(np.float32, copy=False)


def _by_rows(
    scale: Float[np.ndarray, "K ..."], shape: tuple[int, ...]
) -> Float[np.ndarray, " K #m #n"]:
    """Returns the scale of a tensor whose axes after the first are flattened into one."""
    experts, rows = scale.shape[:2]
    if scale.size == experts * rows:
        return scale.reshape(experts, rows, 1)
    columns = np.broadcast_to(scale, (experts, rows, *shape[1:]))
    return columns.reshape(experts, rows, prod(shape[1:]))
