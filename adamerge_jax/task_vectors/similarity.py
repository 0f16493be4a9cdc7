"""Similarity of the experts' task vectors: inner products that never multiply factors out."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adamerge_jax.devices import fetch
from adamerge_jax.task_vectors.delta import Delta
from adamerge_jax.task_vectors.joined import JoinedDelta
from adamerge_jax.task_vectors.low_rank import LowRankDelta
from adamerge_jax.task_vectors.offload.streamed import (
    StreamedDelta,
    apart_from_layers,
    with_sources,
)

_contract = functools.partial(
    jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


def inner_products(
    delta: Delta, shape: tuple[int, ...], experts: int, *, stacked: bool
) -> Float[np.ndarray, "... K K"]:
    """Returns `<tau_j, tau_k>` over the entries of one parameter, for all pairs of experts.

    Two deltas with factors take `sum((left_j^T left_k) * (right_j right_k^T))`, one with factors
    and one without `sum((left_j^T tau_k) * right_j)`: no product of factors exists. Any other
    delta is asked for its entries with one-hot scales, one layer at a time; one that lies outside
    the device for those of a few experts at a time.

    Args:
        delta: The deltas of all K experts for a parameter, as they come from checkpoints.
        shape: Shape of the parameter, `(L, *shape)` where stacked.
        experts: K.
        stacked: True where there is a leading axis of layers.

    Returns:
        float32, `[K, K]`, or `[L, K, K]` where stacked; symmetric, squared norms on the diagonal.
    """
    return fetch(_inner_products(delta, shape, experts, stacked))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _inner_products(
    delta: Delta, shape: tuple[int, ...], experts: int, stacked: bool
) -> Float[Array, "... K K"]:
    if stacked:
        layers, sources = apart_from_layers(delta)
        return jax.lax.map(
            lambda layer: gram(with_sources(layer, sources), shape[1:], experts), layers
        )
    return gram(delta, shape, experts)


def gram(delta: Delta, shape: tuple[int, ...], experts: int) -> Float[Array, "K K"]:
    """Returns `inner_products` of a parameter that is not stacked, for compiled functions."""
    if isinstance(delta, StreamedDelta):
        return _streamed_gram(delta, shape, experts)
    parts = list(_parts(delta, tuple(range(experts)), shape))
    if len(parts) == 1 and len(parts[0][1]) == experts:
        return _block(parts[0][0], parts[0][0])
    products = jnp.zeros((experts, experts))
    for position, (one, rows) in enumerate(parts):
        for other, columns in parts[position:]:
            block = _block(one, other)
            products = products.at[np.ix_(rows, columns)].add(block)
            if other is not one:
                products = products.at[np.ix_(columns, rows)].add(block.T)
    return products


_BLOCK = 4
"""The number of experts whose entries are brought to the device together."""


def _streamed_gram(
    delta: StreamedDelta, shape: tuple[int, ...], experts: int
) -> Float[Array, "K K"]:
    """Returns the inner products of deltas outside the device, block by block of experts."""
    blocks = -(-experts // _BLOCK)
    rows, columns = np.triu_indices(blocks)
    whole = jnp.ones((1, *(1 for _ in shape)))

    def entries(block: Array) -> Float[Array, "B ..."]:
        # The last block repeats the last expert, and what comes of it is cut off.
        chosen = jnp.minimum(block * _BLOCK + jnp.arange(_BLOCK), experts - 1)
        return jax.lax.map(lambda k: delta.expert(k).weighted_sum(whole), chosen)

    pairs = (jnp.asarray(rows, jnp.int32), jnp.asarray(columns, jnp.int32))
    products = jax.lax.map(lambda pair: _block(entries(pair[0]), entries(pair[1])), pairs)
    table = jnp.zeros((blocks, blocks, _BLOCK, _BLOCK)).at[rows, columns].set(products)
    table = table.at[columns, rows].set(products.swapaxes(1, 2))
    return table.swapaxes(1, 2).reshape(blocks * _BLOCK, -1)[:experts, :experts]


def _parts(
    delta: Delta, experts: tuple[int, ...], shape: tuple[int, ...]
) -> Iterator[tuple[LowRankDelta | Array, tuple[int, ...]]]:
    """Yields factors, or entries `[K, *shape]`, with the experts that they are of."""
    if isinstance(delta, JoinedDelta):
        for part, positions in zip(delta.parts, delta.experts, strict=True):
            yield from _parts(part, tuple(experts[at] for at in positions), shape)
    elif isinstance(delta, LowRankDelta):
        yield delta, experts
    else:
        one_hot = jnp.eye(len(experts)).reshape(-1, len(experts), *(1 for _ in shape))
        yield jax.vmap(delta.weighted_sum)(one_hot), experts


def _block(one: LowRankDelta | Array, other: LowRankDelta | Array) -> Float[Array, "J K"]:
    """Returns the inner products of J deltas with K deltas."""
    if isinstance(one, LowRankDelta) and isinstance(other, LowRankDelta):
        left = _contract("jmr,kms->jkrs", one.left, other.left)
        right = _contract("jrn,ksn->jkrs", one.right, other.right)
        return (left * right).sum((-1, -2))
    if isinstance(one, LowRankDelta):
        middle = _contract("jmr,kmn->jkrn", one.left, other)
        return _contract("jkrn,jrn->jk", middle, one.right)
    if isinstance(other, LowRankDelta):
        return _block(other, one).T
    flat, other_flat = (array.reshape(len(array), -1) for array in (one, other))
    return _contract("ji,ki->jk", flat, other_flat)


def cosines(products: Float[np.ndarray, "K K"]) -> Float[np.ndarray, "K K"]:
    """Returns the cosines of the angles between K task vectors, from their inner products.

    Args:
        products: Inner products, of one parameter or summed over several.

    Returns:
        From -1 to 1; NaN where a task vector is 0.
    """
    norms = np.sqrt(np.maximum(np.diag(products), 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip(products / np.outer(norms, norms), -1, 1)
