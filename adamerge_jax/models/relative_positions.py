"""The bias of attention by the distance of two tokens, of T5 and MPNet."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from adamerge_jax.models.layers import Embedding


def relative_buckets(
    distances: Int[np.ndarray, "..."], count: int, furthest: int, *, bidirectional: bool
) -> Int[np.ndarray, "..."]:
    """Returns the bucket of each distance.

    Short distances have a bucket each. Longer ones share buckets whose widths grow geometrically
    up to `furthest`; all longer distances are in the last one.

    Args:
        distances: Position of the key less that of the query.
        count: Number of buckets.
        furthest: The distance from which all distances share the last bucket.
        bidirectional: True where later keys have half of the buckets to themselves (encoder),
            False where all are in bucket 0 because they are masked (decoder).
    """
    if bidirectional:
        count //= 2
        first = np.where(distances > 0, count, 0)
        distances = np.abs(distances)
    else:
        first = 0
        distances = np.maximum(-distances, 0)
    exact = count // 2
    # In float32, like PyTorch: where a bucket begins at an integer, rounding decides.
    octaves = np.log(np.maximum(distances, 1).astype(np.float32) / exact)
    share = octaves / math.log(furthest / exact)
    shared = np.minimum(exact + (share * (count - exact)).astype(np.int32), count - 1)
    return first + np.where(distances < exact, distances, shared)


def relative_bias(
    table: Embedding,
    positions: Int[Array, "... L"],
    longest: int,
    *,
    buckets: int,
    furthest: int,
    bidirectional: bool,
) -> Float[Array, "... heads L L"]:
    """Returns the term that is added to the scores of self-attention, in float32.

    Args:
        table: The term of each bucket and head.
        positions: The position of each slot's token in its text.
        longest: A number above all positions.
        buckets: Number of buckets.
        furthest: The distance from which all distances share the last bucket.
        bidirectional: True where later keys have buckets of their own; see `relative_buckets`.
    """
    distances = np.arange(1 - longest, longest)
    numbers = relative_buckets(distances, buckets, furthest, bidirectional=bidirectional)
    by_distance = table(jnp.asarray(numbers)).astype(jnp.float32)
    places = positions[..., None, :] - positions[..., :, None] + longest - 1
    return jnp.moveaxis(by_distance.T[:, places], 0, -3)
