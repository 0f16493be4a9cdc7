"""Granularities: which parameters share a merge coefficient, from one per expert to one per row.

A granularity is a function of the parameters' shapes, and perhaps options, that returns a
`Granularity`: how coefficients start, and which scale they are for each parameter. It knows names
and shapes, never models. To use one of your own, pass it to `make_learner`, or name it in a recipe
as `package.module:function`.

Where a granularity names no paper it is this project's own.

Coefficients live in a dictionary from group name to an array `[G, K, ...]`: G layers of a stack (1
where nothing is stacked), K experts.

Weight matrices are `(out, in)` here, as in PyTorch's checkpoints: a row is an output unit. In a
Flax kernel, `(in, out)`, an output unit is a column.

Examples:
    >>> from adamerge_jax import granularities
    >>> shapes = {"dense.weight": (4, 3), "dense.bias": (4,)}
    >>> granularity = granularities.row(shapes)
    >>> values = granularity.init(granularities.constant(shapes, experts=2, value=0.3))
    >>> {group: array.shape for group, array in values.items()}  # [G, K, ...]
    {'dense.bias': (1, 2), 'dense.weight': (1, 2, 4)}
    >>> {name: scale.shape for name, scale in granularity.scales(values).items()}  # [K, ...]
    {'dense.weight': (2, 4, 1), 'dense.bias': (2, 1)}
"""

import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from adamerge_jax.coefficients.axes import column, head, row, row_column
from adamerge_jax.coefficients.entry import entry
from adamerge_jax.coefficients.granularity import (
    Granularity,
    PerTensor,
    Shapes,
    Values,
    can_be_split,
    constant,
    count_units,
    per_tensor,
    require_whole,
    shapes_of,
    unprepared,
)
from adamerge_jax.coefficients.mixtures import mixture_expert
from adamerge_jax.coefficients.pieces import chunk, partition
from adamerge_jax.coefficients.singular import singular
from adamerge_jax.coefficients.whole import groups, layer, task, tensor
from adamerge_jax.registry import call_registered

__all__ = [
    "GRANULARITIES",
    "Granularity",
    "PerTensor",
    "Shapes",
    "Values",
    "can_be_split",
    "chunk",
    "column",
    "constant",
    "count_units",
    "entry",
    "groups",
    "head",
    "layer",
    "make_granularity",
    "mixture_expert",
    "partition",
    "per_tensor",
    "require_whole",
    "row",
    "row_column",
    "same_options",
    "shapes_of",
    "singular",
    "task",
    "tensor",
    "unprepared",
]

GRANULARITIES: dict[str, Callable[..., Granularity]] = {
    "task": task,
    "layer": layer,
    "tensor": tensor,
    "groups": groups,
    "mixture_expert": mixture_expert,
    "row": row,
    "column": column,
    "row_column": row_column,
    "head": head,
    "chunk": chunk,
    "partition": partition,
    "singular": singular,
    "entry": entry,
}
"""Granularities by their names in a recipe."""


def make_granularity(name: str, options: Mapping[str, Any], shapes: Shapes) -> Granularity:
    """Returns the granularity of a recipe.

    Args:
        name: A key of `GRANULARITIES`, or `package.module:function`.
        options: Further arguments of the function.
        shapes: Shapes of the parameters.

    Raises:
        InputError: There is no such granularity, or it refuses an option or a shape.

    Examples:
        >>> from adamerge_jax.coefficients.granularities import make_granularity
        >>> make_granularity("chunk", {"pieces": 6}, {"dense.weight": (4, 3)}).units
        {'dense.weight': 'in 6 pieces'}
    """
    return call_registered(
        "coefficients.granularity",
        GRANULARITIES,
        name,
        options,
        arguments=(shapes,),
        returns=Granularity,
    )


def same_options(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Returns True where two sets of a granularity's options are the same.

    Tuples are as lists, which is what a file makes of them. The order of options does not count,
    that within one does: of name patterns the first that fits a parameter takes it.
    """
    first, second = (
        {name: json.dumps(value) for name, value in options.items()} for options in (first, second)
    )
    return first == second


def __getattr__(name: str) -> Any:
    if name == "layer_of":
        from adamerge_jax.parameter_names import layer_of

        warnings.warn(
            "layer_of is in adamerge_jax.parameter_names", DeprecationWarning, stacklevel=2
        )
        return layer_of
    if name == "ALONG_AXES":
        warnings.warn(
            "ALONG_AXES is gone: ask `Granularity.along_axes`", DeprecationWarning, stacklevel=2
        )
        return ("task", "layer", "tensor", "groups", "row", "column", "head")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
