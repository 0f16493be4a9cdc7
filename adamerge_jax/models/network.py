"""A part of a model as a pure function of its parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, PyTree


class Network:
    """An NNX module as a pure function of its parameters.

    Attributes:
        shapes: Shape and dtype of every parameter by name, `[L, *shape]` where stacked.
        batch_statistics: The names of the means and variances that its batch normalisations keep.
    """

    batch_statistics: frozenset[str] = frozenset()

    def __init__(self, make_module: Callable[[], nnx.Module]):
        """Builds the module abstractly: no parameter is allocated."""
        self._graph, state = nnx.split(nnx.eval_shape(make_module))
        self.shapes: dict[str, jax.ShapeDtypeStruct] = {
            ".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)
        }

    def __call__(self, parameters: Mapping[str, Array], *arguments: PyTree, **options: Any) -> Any:
        """Calls the module with the given parameters, arrays or `Mixture`s by name."""
        nested: dict[str, Any] = {}
        for name, leaf in parameters.items():
            *modules, attribute = name.split(".")
            module = nested
            for key in modules:
                module = module.setdefault(key, {})
            module[attribute] = leaf
        return nnx.merge(self._graph, nnx.State(nested))(*arguments, **options)

    def statistics_of(
        self, parameters: Mapping[str, Array], inputs: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Returns mean and variance of what each batch normalisation reads of a batch.

        Args:
            parameters: The parameters by name.
            inputs: The batch.

        Returns:
            The statistics by their names in `batch_statistics`; none for a network without any.
        """
        return {}

    def is_same(self, other: object) -> bool:
        """Returns True if the other is of the same modules: the same function of parameters."""
        if self is other:
            return True
        # Subclasses may be of something else than modules.
        if type(self) is not Network or type(other) is not Network:
            return False
        return self.shapes == other.shapes and self._graph == other._graph
