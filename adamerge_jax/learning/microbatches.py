"""A batch in parts that are run one after the other, so that a step needs less memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from adamerge_jax.data.batches import Batch
from adamerge_jax.errors import InputError


def split(batch: Batch, parts: int) -> Batch:
    """Cuts a batch into parts with as many examples of every task each.

    Weights stay what they are, so that the parts' objectives add up to that of the batch.

    Args:
        batch: B examples of every task, B a multiple of `parts`.
        parts: Their number.

    Returns:
        The same with a leading axis of length `parts` on every array.

    Raises:
        InputError: B is no such multiple.
    """
    tasks, size = batch.weights.shape
    if size % parts:
        raise InputError(
            f"{parts} microbatches cannot have as many each of {size} examples of a task; choose "
            f"a number that divides {size}"
        )

    def by_task(tree: PyTree, blocks: int) -> PyTree:
        """`[blocks * B, ...]`, one block for each task, to `[parts, blocks * B / parts, ...]`."""

        def cut(array: Array) -> Array:
            rest = array.shape[1:]
            cut = jnp.asarray(array).reshape(blocks, parts, size // parts, *rest)
            return cut.swapaxes(0, 1).reshape(parts, -1, *rest)

        return jax.tree.map(cut, tree)

    targets = []
    for own in batch.targets:
        of_others = {name: getattr(own, name) for name in ("expert_elsewhere", "elsewhere_weights")}
        own = by_task(own._replace(**dict.fromkeys(of_others)), 1)
        targets.append(own._replace(**by_task(of_others, tasks - 1)))
    weights = jnp.asarray(batch.weights).reshape(tasks, parts, -1).swapaxes(0, 1)
    return Batch(
        by_task(batch.inputs, tasks), weights, targets, by_task(batch.strong_inputs, tasks)
    )
