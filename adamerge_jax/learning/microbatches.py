"""A batch in parts that are run one after the other, so that a step needs less memory.

`optax.microbatch` wants one length of the leading axis of all arrays, where inputs have that of all
tasks together, and puts other examples into a part.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from adamerge_jax.data.batches import Batch
from adamerge_jax.errors import InputError
from adamerge_jax.stacks import Stacked


def split(batch: Batch, parts: int) -> Batch:
    """Cuts a batch into parts with as many examples of every task each.

    Weights stay what they are, so that the parts' objectives add up to that of the batch.

    Args:
        batch: B examples of every task, B a multiple of `parts`.
        parts: The number of parts.

    Returns:
        The same with a leading axis of length `parts` on every array.

    Raises:
        InputError: B is no such multiple.
    """
    size = batch.weights.shape[1]
    if size % parts:
        raise InputError(
            f"{parts} microbatches cannot have as many each of {size} examples of a task; choose "
            f"a number that divides {size}"
        )

    def cut(array: Array) -> Array:
        """Cuts blocks of B examples, `[blocks * B, ...]`, to `[parts, blocks * B / parts, ...]`."""
        shape = array.shape[1:]
        blocks = jnp.asarray(array).reshape(-1, parts, size // parts, *shape)
        return blocks.swapaxes(0, 1).reshape(parts, -1, *shape)

    def cut_group(array: Array) -> Array:
        """Cuts `[G, B, ...]` to `[parts, G, B / parts, ...]`."""
        group, _, *shape = array.shape
        return cut(array.reshape(-1, *shape)).reshape(parts, group, -1, *shape)

    return Batch(
        jax.tree.map(cut, batch.inputs),
        cut_group(batch.weights),
        jax.tree.map(cut_group, Stacked.of(batch.targets)),
        jax.tree.map(cut, batch.augmented_inputs),
    )


def sum_over_parts(function: Callable[[Batch], PyTree], batch: Batch, parts: int) -> PyTree:
    """Returns the sum of a function's values for the parts of a batch, computed one by one.

    Args:
        function: A function from a batch to arrays.
        batch: The whole batch.
        parts: The number of parts.
    """
    if parts == 1:
        return function(batch)

    def add(sums: PyTree, part: Batch) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, sums, function(part)), None

    by_part = split(batch, parts)
    first = jax.tree.map(lambda array: array[0], by_part)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, first))
    return jax.lax.scan(add, zeros, by_part)[0]
