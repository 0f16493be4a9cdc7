"""Array functions that lay deltas out anew: on the host, or on shapes where there are no arrays."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from adamerge_jax.devices import fetch

Tree = TypeVar("Tree", bound=PyTree)


def is_abstract(tree: PyTree) -> bool:
    """Returns True for a tree of shapes and dtypes, `jax.ShapeDtypeStruct`, in place of arrays."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def lay_out(function: Callable[..., Tree], *arrays: PyTree[Array]) -> Tree:
    """Calls an array function with NumPy on the host's arrays, or computes the shapes it returns.

    Args:
        function: `(numpy, *arrays) -> tree of arrays`, where `numpy` is NumPy, or JAX's where
            arrays are abstract.
        arrays: Arrays, or shapes and dtypes; trees of them, and None, are passed on.

    Returns:
        JAX's arrays, or shapes and dtypes.
    """
    if is_abstract(arrays):
        return jax.eval_shape(functools.partial(function, jnp), *arrays)
    return jax.tree.map(jnp.asarray, function(np, *jax.tree.map(fetch, arrays)))


def random_order(
    size: int, seed: int | None, *, abstract: bool
) -> Int[np.ndarray, " size"] | jax.ShapeDtypeStruct | None:
    """Returns the entries of a flattened parameter in the order in which pieces take them.

    Args:
        size: Number of entries.
        seed: Seed of the order; None where pieces follow each other.
        abstract: True where only its shape is asked for.
    """
    if seed is None:
        return None
    if abstract:
        return jax.ShapeDtypeStruct((size,), np.int32)
    return np.random.default_rng([seed, size]).permutation(size).astype(np.int32)


def positions_in(
    numpy: ModuleType, order: Int[Array, " size"] | None, layers: tuple[int, ...]
) -> Int[Array, "... size"] | None:
    """Returns the place of each entry in an order, the same for each of the layers, if any."""
    if order is None:
        return None
    return numpy.broadcast_to(numpy.argsort(order), (*layers, len(order)))
