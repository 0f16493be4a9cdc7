"""Granularities along an axis of each weight matrix: rows, columns, attention heads."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from adamerge_jax.coefficients.granularity import (
    Granularity,
    Shapes,
    Split,
    can_be_split,
    mean_of_scale,
    require_bool,
    require_whole,
    split_tensors,
)
from adamerge_jax.errors import InputError
from adamerge_jax.parameter_names import matches, tensor_shape
from adamerge_jax.task_vectors import Delta, LoadedDelta
from adamerge_jax.task_vectors.row_column import by_row_and_column


def row(shapes: Shapes, tables: bool = False) -> Granularity:
    """One coefficient per expert and output unit: the rows of each weight matrix.

    Vectors have one coefficient each, and embedding tables too.

    Args:
        shapes: Shapes of the parameters.
        tables: True for a coefficient for each row of what is named an embedding as well: of a
            token, a position, a unit of a vision model's patch projection. For language models
            whose output layer is the table: there every position of the calibration data says
            something about every token.

    Raises:
        InputError: `tables` is neither true nor false.

    Examples:
        >>> from adamerge_jax.coefficients.granularities import constant, row
        >>> shapes = {"dense.weight": (4, 3)}
        >>> row(shapes).init(constant(shapes, experts=2, value=0.3))["dense.weight"].shape
        (1, 2, 4)
    """
    require_bool("tables", tables)
    return split_tensors(
        shapes, lambda name, shape: _along(shape, 0, shape[0], "by row"), tables=tables
    )


def column(shapes: Shapes, axis: int = 1) -> Granularity:
    """One coefficient per expert and input unit: the columns of each weight matrix.

    Vectors and embedding tables have one coefficient each.

    Args:
        shapes: Shapes of the parameters.
        axis: Another axis: -1 for the last one, which has the output units of Flax's kernels,
            those of convolutions too.

    Raises:
        InputError: `axis` is neither 1 nor -1.

    Examples:
        >>> from adamerge_jax.coefficients.granularities import column, constant
        >>> shapes = {"dense.weight": (4, 3)}
        >>> column(shapes).init(constant(shapes, experts=2, value=0.3))["dense.weight"].shape
        (1, 2, 3)
    """
    if axis not in (1, -1) or isinstance(axis, bool):
        raise InputError(f"axis is {axis!r}, expected 1 or -1")
    return split_tensors(
        shapes, lambda name, shape: _along(shape, axis % len(shape), shape[axis], "by column")
    )


def row_column(shapes: Shapes, tables: bool = False) -> Granularity:
    """One coefficient per expert, row and column of each weight matrix: the mean of the two counts.

    `sum_k (diag(row_k) tau_k + tau_k diag(column_k)) / 2`: units that read and units that are read
    are chosen apart. Vectors and embedding tables have one coefficient each, and what has more axes
    than two, such as a convolution, one for each row.

    Args:
        shapes: Shapes of the parameters.
        tables: True for coefficients of an embedding table's rows and columns as well; see `row`.

    Raises:
        InputError: `tables` is neither true nor false.

    Examples:
        >>> from adamerge_jax.coefficients.granularities import constant, row_column
        >>> shapes = {"dense.weight": (4, 3)}
        >>> row_column(shapes).init(constant(shapes, experts=2, value=0.3))["dense.weight"].shape
        (1, 2, 7)
    """
    require_bool("tables", tables)
    of_tensors = {name: tensor_shape(name, shape) for name, shape in shapes.items()}
    heights = {
        name: shape[0]
        for name, shape in of_tensors.items()
        if len(shape) == 2 and can_be_split(name, shape, tables=tables)
    }

    def split(name: str, shape: tuple[int, ...]) -> Split:
        if name not in heights:
            return _along(shape, 0, shape[0], "by row")
        return Split(sum(shape), lambda values: values, "by row and column")

    def prepare(name: str, delta: LoadedDelta) -> Delta:
        return by_row_and_column(delta, heights[name]) if name in heights else delta

    def mean(name: str, scale: Float[Array, "... S"]) -> Float[Array, "..."]:
        if name not in heights:
            return mean_of_scale(name, scale)
        by_row, by_column = jnp.split(scale, [heights[name]], axis=-1)
        return (by_row.mean(-1) + by_column.mean(-1)) / 2

    granularity = split_tensors(shapes, split, prepare=prepare, tables=tables)
    return granularity._replace(mean=mean)


def head(shapes: Shapes, heads: Mapping[str, tuple[int, int]]) -> Granularity:
    """One coefficient per expert and attention head, one per tensor elsewhere.

    Args:
        shapes: Shapes of the parameters.
        heads: By name pattern, the axis along which the heads lie side by side and their number:
            axis 0 (rows) for projections to queries, keys and values, 1 for the output projection.

    Raises:
        InputError: No parameter has heads, the axis is no multiple of their number, or one of the
            two is no whole number.

    Examples:
        >>> from adamerge_jax.coefficients.granularities import constant, head
        >>> shapes = {"query.weight": (8, 8), "mlp.weight": (32, 8)}
        >>> granularity = head(shapes, {"query.*": (0, 4)})  # four heads along the rows
        >>> values = granularity.init(constant(shapes, experts=2, value=0.3))
        >>> values["query.weight"].shape, values["mlp.weight"].shape  # [G, K, heads], [G, K]
        ((1, 2, 4), (1, 2))
    """
    if not isinstance(heads, Mapping) or not all(
        isinstance(pattern, str) and isinstance(place, list | tuple) and len(place) == 2
        for pattern, place in heads.items()
    ):
        raise InputError(
            f"heads is {heads!r}, expected axis and number of heads by name pattern: "
            "{'*.query.*': [0, 12]}"
        )
    for pattern, (axis, count) in heads.items():
        require_whole(f"the axis of {pattern!r} in heads", axis, 0)
        require_whole(f"the number of {pattern!r} in heads", count, 1)

    def split(name: str, shape: tuple[int, ...]) -> Split | None:
        for pattern, (axis, count) in heads.items():
            if matches(name, [pattern]) and axis < len(shape):
                if shape[axis] % count:
                    raise InputError(
                        f"{name} has {shape[axis]} units along axis {axis}, "
                        f"which is no multiple of {count} heads"
                    )
                return _along(shape, axis, count, "by head")
        return None

    granularity = split_tensors(shapes, split, vectors=True)
    if shapes and "by head" not in granularity.units.values():
        raise InputError("no merged parameter has attention heads; take another granularity")
    return granularity


def _along(shape: tuple[int, ...], axis: int, count: int, unit: str) -> Split:
    """Returns the split into `count` equal parts along an axis."""

    def expand(values: Array) -> Array:
        if count != shape[axis]:
            values = jnp.repeat(values, shape[axis] // count, axis=-1)
        tail = [size if position == axis else 1 for position, size in enumerate(shape)]
        return values.reshape(*values.shape[:-1], *tail)

    return Split(count, expand, unit)
