"""Trees of several tasks, those that are alike as one tree with a leading axis.

A compiled function of a list has arguments and operations for each of its trees; of a `Stacked` it
has them for each kind, however many tasks there are.
"""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked(Sequence):
    """A sequence of trees of arrays, one for each task.

    Attributes:
        groups: Trees of tasks that are alike, `[G, ...]`.
        tasks: The positions of the G tasks of each group, ascending.

    Examples:
        >>> import numpy as np
        >>> from adamerge_jax.stacks import Stacked
        >>> heads = Stacked.of([{"bias": np.full(n, task)} for task, n in enumerate([3, 2, 3])])
        >>> heads.tasks, heads[1]["bias"].tolist(), heads.take((0, 2))["bias"].shape
        (((0, 2), (1,)), [1, 1], (2, 3))
    """

    groups: tuple[PyTree[Array], ...]
    tasks: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, trees: Sequence[PyTree[Array]]) -> "Stacked":
        """Stacks the trees of the same structure, shapes and dtypes.

        Args:
            trees: A tree for each task: arrays of NumPy or of JAX, or abstract ones.
        """
        if isinstance(trees, cls):
            return trees
        groups: dict[Any, list[int]] = {}
        for task, tree in enumerate(trees):
            leaves, structure = jax.tree.flatten(tree)
            form = (structure, *((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves))
            groups.setdefault(form, []).append(task)
        stacks = (jax.tree.map(_stack, *(trees[t] for t in tasks)) for tasks in groups.values())
        return cls(tuple(stacks), tuple(map(tuple, groups.values())))

    def __len__(self) -> int:
        return sum(map(len, self.tasks))

    def __getitem__(self, task: Any) -> Any:
        """Returns the tree of one task."""
        group, place = self._place(operator.index(task))

        def of(array: Array) -> Array:
            if isinstance(array, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(array.shape[1:], array.dtype)
            return array[place]

        return jax.tree.map(of, self.groups[group])

    def group_of(self, task: int) -> int:
        """Returns the position of a task's group."""
        return self._place(task)[0]

    def take(self, tasks: Sequence[int]) -> PyTree[Array]:
        """Returns the trees of tasks of one group, `[len(tasks), ...]`."""
        group = self.group_of(tasks[0])
        return rows(self.groups[group], [self.tasks[group].index(t) for t in tasks])

    def _place(self, task: int) -> tuple[int, int]:
        """Returns a task's group, and its place in it."""
        for group, tasks in enumerate(self.tasks):
            if task in tasks:
                return group, tasks.index(task)
        raise IndexError(task)


def rows(tree: PyTree[Array], chosen: Sequence[int]) -> PyTree[Array]:
    """Returns some rows of the arrays of a tree; the arrays themselves if these are all."""

    def of(array: Array) -> Array:
        return array if list(chosen) == list(range(len(array))) else array[np.array(chosen)]

    return jax.tree.map(of, tree)


def _stack(*leaves: Array) -> Array:
    first = leaves[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *first.shape), first.dtype)
    numpy = np if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp
    return numpy.stack(leaves)
