"""The granularity as a type: parameters that share a coefficient, and the scale of each parameter.

Coefficients live in a dictionary from group name to an array `[G, K, ...]`: G layers of a stack (1
where nothing is stacked), K experts.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from adamerge_jax.errors import InputError
from adamerge_jax.parameter_names import (
    is_stacked,
    layers_of,
    matches,
    named_leaves,
    tensor_shape,
    tensors_of,
)
from adamerge_jax.task_vectors import Delta, LoadedDelta, LowRankDelta, RowColumnDelta

Values = Mapping[str, Float[Array, "G K ..."]]
"""Coefficients (or what a constraint maps to them) by group."""

Shapes = Mapping[str, tuple[int, ...]]
"""Parameter shapes by name, `(L, *shape)` where the name is stacked."""

PerTensor = Mapping[str, Float[Array, "G K"]]
"""One coefficient per parameter and expert: `[L, K]` where the name is stacked, else `[1, K]`."""


def mean_of_scale(name: str, scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the mean of a scale over all but experts and layers, where parts are of one size."""
    leading = 1 + is_stacked(name)
    return scale.reshape(*scale.shape[:leading], -1).mean(-1)


def unprepared(name: str, delta: LoadedDelta) -> Delta:
    """Returns the delta as it was read: the `prepare` of a scale for its entries."""
    return delta


class Granularity(NamedTuple):
    """Parameters that share a coefficient, made for the shapes of the parameters.

    What a merge by a granularity can be is computed from its scales and from `prepare`, so that
    one of a user's own is treated as the package's are.

    Attributes:
        init: `PerTensor -> Values`, where every coefficient is the mean of those of its tensors.
        scales: `Values -> {parameter name: scale}`, linear in the values. A scale is `[K, ...]`
            (`[L, K, ...]` where the parameter is stacked), for the delta that `prepare` returns.
        prepare: `(name, delta) -> delta`, in the representation that the scale is for.
        units: The way in which a tensor shares coefficients, in words, by parameter name: `whole`,
            `by row`, ...
        mean: `(name, scale) -> [..., K]`, the mean coefficient of the parameter's entries.
        cuts_rows: True where parts of one row have different coefficients that are not those of
            columns, for which integers with a step a row do not serve.
    """

    init: Callable[[PerTensor], Values]
    scales: Callable[[Values], dict[str, Float[Array, "..."]]]
    prepare: Callable[[str, LoadedDelta], Delta] = unprepared
    units: Mapping[str, str] = {}
    mean: Callable[[str, Float[Array, "..."]], Float[Array, "..."]] = mean_of_scale
    cuts_rows: bool = False

    @property
    def prepares(self) -> bool:
        """True where deltas are laid out anew for the scales."""
        return self.prepare is not unprepared

    def along_axes(self, shapes: Shapes) -> bool:
        """Returns True where each scale broadcasts against its parameter, not against pieces of it.

        Args:
            shapes: Shapes of the parameters that the granularity was made for.
        """
        return self._scales_fit(shapes, most_axes=None)

    def keeps_factors(self, shapes: Shapes) -> bool:
        """Returns True where a merge of low-rank deltas is one, with factors that are scaled.

        Args:
            shapes: Shapes of the parameters that the granularity was made for.
        """
        if not self.prepares:
            return self._scales_fit(shapes, most_axes=1)
        kinds = {
            type(self.prepare(name, _rank_one(shape)))
            for name, shape in shapes.items()
            if len(tensor_shape(name, shape)) == 2
        }
        return RowColumnDelta in kinds and kinds <= {RowColumnDelta, LowRankDelta}

    def _scales_fit(self, shapes: Shapes, most_axes: int | None) -> bool:
        """Returns True where scales vary along at most so many axes of their parameters."""
        if self.prepares:
            return False
        experts = 2
        scales = jax.eval_shape(lambda: self.scales(self.init(constant(shapes, experts, 0.0))))
        for name, shape in shapes.items():
            leading = (*shape[: is_stacked(name)], experts)
            sizes = scales[name].shape[len(leading) :]
            axes = tensor_shape(name, shape)
            if scales[name].shape[: len(leading)] != leading or len(sizes) != len(axes):
                return False
            varying = [(size, axis) for size, axis in zip(sizes, axes, strict=True) if size != 1]
            if any(size != axis for size, axis in varying):
                return False
            if most_axes is not None and len(varying) > most_axes:
                return False
        return True


def _rank_one(shape: tuple[int, ...]) -> LowRankDelta:
    """Returns the abstract factors of one expert's change to a matrix, which may be stacked."""
    *layers, m, n = shape
    left, right = (
        jax.ShapeDtypeStruct((*layers, 1, *ends), jnp.float32) for ends in ((m, 1), (1, n))
    )
    return LowRankDelta(left, right)


def shapes_of(base: PyTree[Array], deltas: Iterable[str]) -> Shapes:
    """Returns the shapes that a granularity is made for: those of the parameters that are mixed.

    Args:
        base: Parameters of the base model, any pytree.
        deltas: Names of the parameters that experts changed, such as what `task_vectors` returns.

    Returns:
        `(*shape)` by name, `(L, *shape)` where the name is stacked.

    Raises:
        KeyError: The base has no such parameter.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.coefficients.granularities import shapes_of
        >>> base = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
        >>> shapes_of(base, ["dense.kernel"])
        {'dense.kernel': (3, 2)}
    """
    leaves = named_leaves(base)
    return {name: leaves[name].shape for name in deltas}


def constant(shapes: Shapes, experts: int, value: float) -> PerTensor:
    """Returns the same coefficient for all experts and tensors, for a granularity's `init`.

    Returns:
        `[1, K]` by name, `[L, K]` where the name is stacked.

    Examples:
        >>> from adamerge_jax.coefficients.granularities import constant
        >>> constant({"dense.weight": (4, 3)}, experts=2, value=0.5)["dense.weight"].tolist()
        [[0.5, 0.5]]
    """
    return {
        name: jnp.full((layers_of(name, shape), experts), value, jnp.float32)
        for name, shape in shapes.items()
    }


def per_tensor(
    granularity: Granularity, values: Values, shapes: Shapes, experts: int
) -> dict[str, Float[Array, "G K"]]:
    """Returns the mean coefficient of each tensor and expert, from those of any granularity.

    Returns:
        `[1, K]` by parameter name, `[L, K]` where the name is stacked.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.coefficients.granularities import per_tensor, row
        >>> shapes = {"dense.weight": (2, 3)}
        >>> values = {"dense.weight": jnp.array([[[0.0, 1.0]]])}  # [G, K, rows]: one expert
        >>> per_tensor(row(shapes), values, shapes, experts=1)["dense.weight"].tolist()
        [[0.5]]
    """
    return {
        name: granularity.mean(name, scale).reshape(layers_of(name, shapes[name]), experts)
        for name, scale in granularity.scales(values).items()
    }


def count_units(granularity: Granularity, values: Values, shapes: Shapes) -> str:
    """Returns the number of coefficients, and of the tensors that share them alike, in words."""
    total = sum(array.size for array in values.values())
    tensors: dict[str, int] = {}
    for name, unit in granularity.units.items():
        tensors[unit] = tensors.get(unit, 0) + layers_of(name, shapes[name])
    by_unit = ", ".join(f"{count} tensors {unit}" for unit, count in tensors.items())
    return f"{total:,} coefficients" + (f" ({by_unit})" if by_unit else "")


class Split(NamedTuple):
    """The parts of one tensor that have a coefficient each.

    Attributes:
        count: Number of coefficients of an expert.
        expand: From `[..., K, count]` to the scale.
        unit: The parts, in words.
    """

    count: int
    expand: Callable[[Array], Array]
    unit: str


def split_tensors(
    shapes: Shapes,
    split: Callable[[str, tuple[int, ...]], Split | None],
    prepare: Callable[[str, LoadedDelta], Delta] = unprepared,
    vectors: bool = False,
    tables: bool = False,
) -> Granularity:
    """Returns a granularity with tensors split into parts, one group per parameter.

    Args:
        shapes: Shapes of the parameters.
        split: From name and shape (without L) to the parts, or None for a whole tensor.
        prepare: `prepare` of the parameters that are split.
        vectors: True where vectors may be split too.
        tables: True where embedding tables may be split too.
    """
    splits = {}
    for name, shape in shapes.items():
        of_tensor = tensor_shape(name, shape)
        if can_be_split(name, of_tensor, vectors, tables):
            parts = split(name, of_tensor)
            if parts is not None and parts.count > 1:
                splits[name] = parts

    def init(start: PerTensor) -> Values:
        return {
            name: jnp.asarray(
                jnp.repeat(start[name][..., None], splits[name].count, axis=-1)
                if name in splits
                else start[name],
                jnp.float32,
            )
            for name in sorted(shapes)
        }

    def scale(name: str, values: Array) -> Array:
        if name not in splits:
            return _broadcastable(name, shapes[name], values)
        return splits[name].expand(values if is_stacked(name) else values[0])

    return Granularity(
        init,
        lambda values: {name: scale(name, values[name]) for name in shapes},
        unprepared
        if prepare is unprepared
        else lambda name, delta: prepare(name, delta) if name in splits else delta,
        {name: splits[name].unit if name in splits else "whole" for name in shapes},
    )


def group_tensors(shapes: Shapes, group_of: Callable[[str], str], unit: str) -> Granularity:
    """Returns a granularity with whole tensors in its groups.

    Args:
        shapes: Shapes of the parameters.
        group_of: From the name of a tensor, without `*`, to its group. The layers of a stack may
            be in groups of their own, and those groups may hold tensors outside of the stack.
        unit: The way in which tensors share coefficients, in words.
    """
    members = {
        name: [group_of(tensor) for tensor in tensors_of(name, shapes[name])] for name in shapes
    }
    names_of_groups = sorted({group for groups in members.values() for group in groups})

    def init(start: PerTensor) -> Values:
        collected: dict[str, list[Array]] = {group: [] for group in names_of_groups}
        for name, groups in members.items():
            for group, values in zip(groups, start[name], strict=True):
                collected[group].append(values)
        means = {
            group: mean_of_tensors(jnp.stack(values))[None] for group, values in collected.items()
        }
        return {group: mean.astype(jnp.float32) for group, mean in means.items()}

    def scale(name: str, groups: list[str], values: Values) -> Array:
        different = groups if len(set(groups)) > 1 else groups[:1]
        rows = jnp.concatenate([values[group] for group in different])
        return _broadcastable(name, shapes[name], rows)

    return Granularity(
        init,
        lambda values: {name: scale(name, groups, values) for name, groups in members.items()},
        units=dict.fromkeys(shapes, unit),
    )


def mean_of_tensors(values: Float[Array, "N ..."]) -> Float[Array, "..."]:
    """Returns the mean over the first axis; exact where all are equal, as at a constant start."""
    return values[0] + (values - values[0]).mean(0)


def _broadcastable(
    name: str, shape: tuple[int, ...], values: Float[Array, "G K"]
) -> Float[Array, "..."]:
    """Returns the scale of a whole parameter: `[K, 1, ...]`, or `[L, K, 1, ...]` where stacked."""
    if not is_stacked(name):
        return values[0].reshape(-1, *(1 for _ in shape))
    values = jnp.broadcast_to(values, (shape[0], values.shape[1]))
    return values.reshape(*values.shape, *(1 for _ in shape[1:]))


def can_be_split(
    name: str, shape: tuple[int, ...], vectors: bool = False, tables: bool = False
) -> bool:
    """Returns True where parts of a tensor may have coefficients of their own.

    Rows of an embedding table are tokens, most of which the calibration data never shows; entries
    of a vector are too few examples of anything.
    """
    if matches(name, _TABLES) and not tables:
        return False
    return len(shape) >= 2 or (vectors and len(shape) == 1)


_TABLES = ("*embed*", "shared.weight", "*relative_attention_bias.weight")
"""Names of tables that are read by rows; the last two are T5's."""


def require_whole(option: str, value: Any, least: int) -> None:
    """Refuses an option that is no whole number.

    Args:
        option: Its name.
        value: What a recipe gives for it: anything.
        least: The smallest number allowed.

    Raises:
        InputError: Says what it is and what is expected.
    """
    # To Python true is 1.
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{option} is {value!r}, expected a whole number, at least {least}")


def require_bool(option: str, value: Any) -> None:
    """Refuses an option that is neither true nor false."""
    if not isinstance(value, bool):
        raise InputError(f"{option} is {value!r}, expected true or false")
