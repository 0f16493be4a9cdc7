"""Arrays of several tasks side by side."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree


def stacked(trees: Sequence[PyTree[Array]]) -> PyTree[Array]:
    """Stacks the leaves of trees of the same shapes, `[trees, ...]`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def rows(tree: PyTree[Array], chosen: Sequence[int], count: int) -> PyTree[Array]:
    """Returns some rows of arrays that have so many; the arrays themselves if these are all."""
    if tuple(chosen) == tuple(range(count)):
        return tree
    return jax.tree.map(lambda array: array[np.array(chosen)], tree)
