"""The merged tensor of whole experts, straight from their files: block by block, in float32.

Nothing but the result is ever as large as a tensor. A block of the base and of every expert is
read, summed while it lies in the processor's cache, and rounded once; a few threads do so side by
side, so that disk and processor both have work. The sums are those of `Mixture.materialize` on a
`DenseDelta`, without a compilation for every shape and without float32 copies of whole tensors.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np
from jaxtyping import Float

from adamerge_jax.checkpoints.matching import MatchedCheckpoint

_BLOCK = 2**18
"""Entries of a block: few enough that float32 copies stay in the processor's cache, and so many
that the threads seldom wait for Python."""

THREADS = 4
"""That blocks are folded in side by side; more only wait for memory."""


def fold_tensor(
    name: str,
    base: MatchedCheckpoint,
    experts: Sequence[MatchedCheckpoint],
    scale: Float[np.ndarray, "K ..."],
    threads: ThreadPoolExecutor,
    dtype: np.dtype | None = None,
) -> Float[np.ndarray, "..."]:
    """`theta_base + sum_k scale_k * (theta_k - theta_base)`, summed in float32.

    Args:
        name: Of the parameter, which the base and all experts have.
        base: The base.
        experts: K whole models.
        scale: The coefficients, broadcasting against `[K, *shape]`.
        threads: That blocks are folded in.
        dtype: Of the merged tensor, by default the base's.

    Raises:
        InputError: A value of the base or of an expert is NaN or infinite.
    """
    shape = base.shape(name)
    merged = np.empty(shape, dtype or base.dtype(name))
    # Blocks are of entries where all have the same coefficients, else of whole rows.
    if scale.size == len(scale):
        rows, scale = merged.reshape(-1, 1), scale.reshape(len(scale), 1, 1)
    else:
        rows, scale = merged.reshape(shape[0], -1), _by_rows(scale, shape)
    height = max(1, _BLOCK // max(1, rows.shape[1]))

    def fold_block(first: int) -> bool:
        part = slice(first, first + height)
        own = scale if scale.shape[1] == 1 else scale[:, part]
        return _fold_block(name, base, experts, first * rows.shape[1], own, rows[part])

    blocks = range(0, len(rows), height)
    run = threads.map if len(blocks) > 1 else map
    if not all(list(run(fold_block, blocks))):
        # Whatever is NaN or infinite makes the sum so, whatever its coefficient; reading it as a
        # whole says what and where. A sum of finite values may overflow, and then stays so.
        for checkpoint in (base, *experts):
            checkpoint.read(name)
    return merged


def _fold_block(
    name: str,
    base: MatchedCheckpoint,
    experts: Sequence[MatchedCheckpoint],
    first: int,
    scale: Float[np.ndarray, " K #rows #columns"],
    out: Float[np.ndarray, "rows columns"],
) -> bool:
    """Folds the entries from `first` on into `out`; whether all sums are finite."""
    start = _read(base, name, first, out.shape)
    total = np.zeros(out.shape, np.float32)
    # What is not finite is told at the end, with names.
    with np.errstate(invalid="ignore", over="ignore"):
        for expert, own in zip(experts, scale, strict=True):
            delta = _read(expert, name, first, out.shape)
            np.subtract(delta, start, out=delta)
            np.multiply(delta, own, out=delta)
            np.add(total, delta, out=total)
        np.add(start, total, out=total)
        out[...] = total
    return bool(np.isfinite(total).all())


def _read(
    model: MatchedCheckpoint, name: str, first: int, shape: tuple[int, ...]
) -> Float[np.ndarray, "rows columns"]:
    """Entries of a tensor as float32."""
    stored = np.empty(shape, model.dtype(name))
    model.checkpoint.read_part(model.names[name], first, stored.reshape(-1))
    return stored.astype(np.float32, copy=False)


def _by_rows(
    scale: Float[np.ndarray, "K ..."], shape: tuple[int, ...]
) -> Float[np.ndarray, " K #m #n"]:
    """The scale of a tensor whose axes after the first are one."""
    experts, rows = scale.shape[:2]
    if scale.size == experts * rows:
        return scale.reshape(experts, rows, 1)
    columns = np.broadcast_to(scale, (experts, rows, *shape[1:]))
    return columns.reshape(experts, rows, prod(shape[1:]))
