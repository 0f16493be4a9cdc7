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
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from adamerge_jax.errors import InputError
from adamerge_jax.parameter_names import (
    is_stacked,
    matches,
    named_leaves,
    numbered_block,
    tensor_shape,
    tensors_of,
)
from adamerge_jax.registry import call_registered
from adamerge_jax.task_vectors import Delta, LoadedDelta

Values = Mapping[str, Float[Array, "G K ..."]]
"""Coefficients (or what a constraint maps to them) by group."""

Shapes = Mapping[str, tuple[int, ...]]
"""Parameter shapes by name, `(L, *shape)` where the name is stacked."""

PerTensor = Mapping[str, Float[Array, "G K"]]
"""One coefficient per parameter and expert: `[L, K]` where the name is stacked, else `[1, K]`."""


def unprepared(name: str, delta: LoadedDelta) -> Delta:
    """The delta as it was read: what `prepare` is where the scale is for its entries."""
    return delta


class Granularity(NamedTuple):
    """Which parameters share a coefficient.

    Attributes:
        init: `PerTensor -> Values`, where every coefficient is that of the tensors it is for, on
            average.
        scales: `Values -> {parameter name: scale}`, each scale `[K, ...]` (`[L, K, ...]` where the
            parameter is stacked), for the delta that `prepare` returns.
        prepare: `(name, delta) -> delta`, in the representation that the scale is for.
        units: How tensors share coefficients, in words, by parameter name: `whole`, `by row`, ...
    """

    init: Callable[[PerTensor], Values]
    scales: Callable[[Values], dict[str, Float[Array, "..."]]]
    prepare: Callable[[str, LoadedDelta], Delta] = unprepared
    units: Mapping[str, str] = {}


def task(shapes: Shapes) -> Granularity:
    """One coefficient per expert: task-wise AdaMerging (Yang et al., 2024, eq. 5).

    Examples:
        >>> from adamerge_jax.coefficients.granularities import constant, task
        >>> shapes = {"a.weight": (4, 3), "b.weight": (2, 4)}
        >>> task(shapes).init(constant(shapes, experts=3, value=0.3))["all"].shape  # [G, K]
        (1, 3)
    """
    return _grouped(shapes, lambda tensor: "all", "all together")


def layer(shapes: Shapes) -> Granularity:
    """One coefficient per expert and layer.

    A numbered block is a layer. So is each module beside the blocks: embeddings, a final norm, a
    pooler, a projection.

    Examples:
        >>> from adamerge_jax.coefficients.granularities import constant, layer
        >>> shapes = {"layers.0.weight": (4, 3), "layers.0.bias": (4,), "norm.weight": (4,)}
        >>> values = layer(shapes).init(constant(shapes, experts=3, value=0.3))
        >>> {group: array.shape for group, array in values.items()}  # [G, K] by layer
        {'layers.0': (1, 3), 'norm': (1, 3)}
    """
    names = [each for name, shape in shapes.items() for each in tensors_of(name, shape)]
    return _grouped(shapes, lambda tensor: layer_of(tensor, names), "by layer")


def tensor(shapes: Shapes) -> Granularity:
    """One coefficient per expert and parameter tensor: AdaMerging's "layer-wise" (eq. 6).

    Examples:
        >>> from adamerge_jax.coefficients.granularities import constant, tensor
        >>> shapes = {"layers.*.weight": (12, 4, 3)}  # stacked: 12 layers
        >>> tensor(shapes).init(constant(shapes, experts=3, value=0.3))["layers.*.weight"].shape
        (12, 3)
    """
    return _split(shapes, lambda name, shape: None)


def groups(shapes: Shapes, patterns: Mapping[str, Sequence[str]]) -> Granularity:
    """One coefficient per expert and group of parameters that name patterns pick.

    Args:
        shapes: Of the parameters.
        patterns: By group, patterns such as `*.attention.*` or `encoder.layer.3.*`; the first
            group that fits a parameter's name (without `*`) takes it. What fits none is in the
            group `others`.

    Raises:
        InputError: A group's patterns are no list of texts, or it is called like a stack of layers.

    Examples:
        >>> from adamerge_jax.coefficients.granularities import constant, groups
        >>> shapes = {"0.attention.weight": (4, 4), "0.mlp.weight": (4, 4), "norm.weight": (4,)}
        >>> granularity = groups(shapes, {"attention": ["*.attention.*"]})
        >>> values = granularity.init(constant(shapes, experts=3, value=0.3))
        >>> {group: array.shape for group, array in values.items()}  # [G, K]
        {'attention': (1, 3), 'others': (1, 3)}
    """
    if not isinstance(patterns, Mapping):
        raise InputError(
            f"patterns is {patterns!r}, expected lists of name patterns by group: "
            "{attention: ['*.attention.*']}"
        )
    for group, own in patterns.items():
        if not isinstance(group, str):
            raise InputError(f"a group is called {group!r}, expected a text; put it in quotes")
        if not isinstance(own, list | tuple) or not all(isinstance(each, str) for each in own):
            raise InputError(f"the patterns of {group!r} are {own!r}, expected a list of texts")
        if is_stacked(group):
            raise InputError(f"a group cannot be called {group!r}; give it a name without '*'")

    def group_of(name: str) -> str:
        return next((group for group in patterns if matches(name, patterns[group])), "others")

    return _grouped(shapes, group_of, "by group")


def row(shapes: Shapes, tables: bool = False) -> Granularity:
    """One coefficient per expert and output unit: the rows of each weight matrix.

    Vectors have one coefficient each, and embedding tables too.

    Args:
        shapes: Of the parameters.
        tables: Whether each row of what is named an embedding has a coefficient instead: of a
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
    _require_bool("tables", tables)
    return _split(shapes, lambda name, shape: _along(shape, 0, shape[0], "by row"), tables=tables)


def column(shapes: Shapes) -> Granularity:
    """One coefficient per expert and input unit: the columns of each weight matrix.

    Vectors and embedding tables have one coefficient each.

    Examples:
        >>> from adamerge_jax.coefficients.granularities import column, constant
        >>> shapes = {"dense.weight": (4, 3)}
        >>> column(shapes).init(constant(shapes, experts=2, value=0.3))["dense.weight"].shape
        (1, 2, 3)
    """
    return _split(shapes, lambda name, shape: _along(shape, 1, shape[1], "by column"))


def head(shapes: Shapes, heads: Mapping[str, tuple[int, int]]) -> Granularity:
    """One coefficient per expert and attention head, one per tensor elsewhere.

    Args:
        shapes: Of the parameters.
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
        isinstance(pattern, str) and isinstance(own, list | tuple) and len(own) == 2
        for pattern, own in heads.items()
    ):
        raise InputError(
            f"heads is {heads!r}, expected axis and number of heads by name pattern: "
            "{'*.query.*': [0, 12]}"
        )
    for pattern, (axis, count) in heads.items():
        require_whole(f"the axis of {pattern!r} in heads", axis, 0)
        require_whole(f"the number of {pattern!r} in heads", count, 1)

    def split(name: str, shape: tuple[int, ...]) -> "_Split | None":
        for pattern, (axis, count) in heads.items():
            if matches(name, [pattern]) and axis < len(shape):
                if shape[axis] % count:
                    raise InputError(
                        f"{name} has {shape[axis]} units along axis {axis}, "
                        f"which is no multiple of {count} heads"
                    )
                return _along(shape, axis, count, "by head")
        return None

    granularity = _split(shapes, split, vectors=True)
    if shapes and "by head" not in granularity.units.values():
        raise InputError("no merged parameter has attention heads; take another granularity")
    return granularity


def chunk(shapes: Shapes, pieces: int | Mapping[str, int], tables: bool = False) -> Granularity:
    """One coefficient per expert and contiguous piece of the flattened tensor (Expert Merging).

    A piece holds `ceil(size / pieces)` entries, the last one perhaps fewer. Vectors have one
    coefficient each, and embedding tables too.

    Args:
        shapes: Of the parameters.
        pieces: How many pieces, or how many by name pattern: the first that fits counts, and what
            fits none is not cut. Layers of one stack that differ in their number of pieces must
            have numbers that divide the largest, and that one the tensor's size.
        tables: Whether embedding tables are cut as well; see `row`.

    Raises:
        InputError: A number of pieces is no whole number, a tensor has fewer entries than pieces,
            or a stack cannot be cut as asked.

    Examples:
        >>> from adamerge_jax.coefficients.granularities import chunk, constant
        >>> shapes = {"dense.weight": (4, 3)}
        >>> granularity = chunk(shapes, pieces=6)
        >>> granularity.init(constant(shapes, experts=2, value=0.3))["dense.weight"].shape
        (1, 2, 6)
    """
    _require_bool("tables", tables)
    if isinstance(pieces, Mapping):
        for pattern, number in pieces.items():
            if not isinstance(pattern, str):
                raise InputError(f"pieces are for {pattern!r}, expected a name pattern in quotes")
            require_whole(f"the number of pieces of {pattern!r}", number, 1)
    else:
        require_whole("pieces", pieces, 1)
    counts = {name: _pieces_of(name, shapes, pieces, tables) for name in shapes}

    def split(name: str, shape: tuple[int, ...]) -> "_Split | None":
        most = max(counts[name])
        return _pieces(most) if most > 1 else None

    uniform = _split(
        shapes,
        split,
        prepare=lambda name, delta: delta.in_pieces(max(counts[name]), stacked=is_stacked(name)),
        tables=tables,
    )
    uneven = {name: counts[name] for name in shapes if len(set(counts[name])) > 1}
    if not uneven:
        return uniform

    # Layers of one stack with unlike numbers of pieces: a group for each, and in the scan as many
    # pieces as the most finely cut layer has, some of which share their coefficient.
    even = [name for name in shapes if name not in uneven]

    def init(start: PerTensor) -> Values:
        values = uniform.init(start)
        ragged = {
            each: jnp.broadcast_to(own[None, :, None], (1, len(own), count))
            for name in uneven
            for each, own, count in zip(
                tensors_of(name, shapes[name]), start[name], counts[name], strict=True
            )
        }
        return {name: values[name] for name in even} | ragged

    def scales(values: Values) -> dict[str, Array]:
        stacked = {name: values[name] for name in even}
        for name in uneven:
            most = max(counts[name])
            layers = [
                jnp.repeat(values[each], most // count, axis=2)
                for each, count in zip(tensors_of(name, shapes[name]), counts[name], strict=True)
            ]
            stacked[name] = jnp.concatenate(layers)
        return uniform.scales(stacked)

    units = {name: f"in up to {max(counts[name])} pieces" for name in uneven}
    return uniform._replace(init=init, scales=scales, units=dict(uniform.units) | units)


def partition(shapes: Shapes, groups: int, seed: int = 0) -> Granularity:
    """One coefficient per expert and random group of a tensor's entries: aTLAS xK.

    (Zhang et al., NeurIPS 2024, section 5.3.) Groups are of one size, up to rounding; tensors of
    one shape are split alike, as in the paper. Vectors and embedding tables have one coefficient
    each.

    Args:
        shapes: Of the parameters.
        groups: Number of groups of every tensor.
        seed: Of the assignment.

    Raises:
        InputError: A tensor has fewer entries than groups, or an option is no whole number.

    Examples:
        >>> from adamerge_jax.coefficients.granularities import constant, partition
        >>> shapes = {"dense.weight": (4, 3)}
        >>> granularity = partition(shapes, groups=5, seed=0)
        >>> granularity.init(constant(shapes, experts=2, value=0.3))["dense.weight"].shape
        (1, 2, 5)
    """
    require_whole("groups", groups, 1)
    require_whole("seed", seed, 0)
    for name in shapes:
        _pieces_of(name, shapes, groups)
    return _split(
        shapes,
        lambda name, shape: _pieces(groups)._replace(unit=f"in {groups} random parts"),
        prepare=lambda name, delta: delta.in_pieces(groups, stacked=is_stacked(name), seed=seed),
    )


def singular(shapes: Shapes, rank: int) -> Granularity:
    """One coefficient per expert and leading singular direction of what it changed in a matrix.

    With `tau_k = sum_i s_ki u_ki v_ki^T`, the directions `i <= rank` have a coefficient each and
    the rest of the sum has one more. (Cf. AdaRank, Lee et al., 2025, which learns which directions
    to keep, and TSV, Gargiulo et al., CVPR 2025.) Vectors, embedding tables and what is no matrix
    have one coefficient each.

    Args:
        shapes: Of the parameters.
        rank: Number of leading directions.

    Raises:
        InputError: The rank is no whole number, or a matrix has fewer singular directions.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax import DenseDelta
        >>> from adamerge_jax.coefficients.granularities import constant, singular
        >>> shapes = {"dense.weight": (4, 3)}
        >>> granularity = singular(shapes, rank=2)
        >>> granularity.init(constant(shapes, experts=2, value=0.3))["dense.weight"].shape
        (1, 2, 3)
        >>> delta = DenseDelta(jnp.ones((2, 4, 3)))  # is to be laid out anew for such scales
        >>> granularity.prepare("dense.weight", delta).left.shape  # [K, m, rank]
        (2, 4, 2)
    """
    require_whole("rank", rank, 1)

    def split(name: str, shape: tuple[int, ...]) -> "_Split | None":
        if len(shape) != 2:
            return None
        if rank > min(shape):
            raise InputError(
                f"{name} of shape {shape} has {min(shape)} singular "
                f"directions, fewer than rank {rank}"
            )
        return _Split(rank + 1, lambda values: values, "by singular direction")

    return _split(shapes, split, prepare=lambda name, delta: delta.by_direction(rank))


GRANULARITIES: dict[str, Callable[..., Granularity]] = {
    "task": task,
    "layer": layer,
    "tensor": tensor,
    "groups": groups,
    "row": row,
    "column": column,
    "head": head,
    "chunk": chunk,
    "partition": partition,
    "singular": singular,
}
"""Granularities by their names in a recipe."""

ALONG_AXES = ("task", "layer", "tensor", "groups", "row", "column", "head")
"""Those whose scale broadcasts against the parameter itself, not against pieces of it."""


def make_granularity(name: str, options: Mapping[str, Any], shapes: Shapes) -> Granularity:
    """The granularity of a recipe.

    Args:
        name: A key of `GRANULARITIES`, or `package.module:function`.
        options: Further arguments of the function.
        shapes: Of the parameters.

    Raises:
        InputError: There is no such granularity, or it refuses an option or a shape.

    Examples:
        >>> from adamerge_jax.coefficients.granularities import make_granularity
        >>> make_granularity("chunk", {"pieces": 6}, {"dense.weight": (4, 3)}).units
        {'dense.weight': 'in 6 pieces'}
    """
    return call_registered(
        "coefficients.granularity", GRANULARITIES, name, options, arguments=(shapes,)
    )


def same_options(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether a granularity's options are the same.

    Tuples are as lists, which is what a file makes of them. The order of options does not count,
    that within one does: of name patterns the first that fits a parameter takes it.
    """
    first, second = (
        {name: json.dumps(value) for name, value in options.items()} for options in (first, second)
    )
    return first == second


def require_whole(option: str, value: Any, least: int) -> None:
    """Refuses an option that is to be a whole number and is none.

    Args:
        option: What it is called.
        value: What it is, from a recipe: anything.
        least: The smallest number that it may be.

    Raises:
        InputError: Says what it is and what is expected.
    """
    # To Python true is 1.
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{option} is {value!r}, expected a whole number, at least {least}")


def _require_bool(option: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InputError(f"{option} is {value!r}, expected true or false")


def shapes_of(base: PyTree[Array], deltas: Iterable[str]) -> Shapes:
    """The shapes that a granularity is made for: those of the parameters that are mixed.

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
    """The same coefficient for all experts and tensors, for a granularity's `init`.

    Returns:
        `[1, K]` by name, `[L, K]` where the name is stacked.

    Examples:
        >>> from adamerge_jax.coefficients.granularities import constant
        >>> constant({"dense.weight": (4, 3)}, experts=2, value=0.5)["dense.weight"].tolist()
        [[0.5, 0.5]]
    """
    return {
        name: jnp.full((_layers(name, shape), experts), value, jnp.float32)
        for name, shape in shapes.items()
    }


def per_tensor(
    granularity: Granularity, values: Values, shapes: Shapes, experts: int
) -> dict[str, Float[Array, "G K"]]:
    """The mean coefficient of each tensor and expert, from coefficients of any granularity.

    A piece of a tensor counts by the number of scales it has, which is that of its pieces.

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
        name: scale.reshape(_layers(name, shapes[name]), experts, -1).mean(-1)
        for name, scale in granularity.scales(values).items()
    }


def count_units(granularity: Granularity, values: Values, shapes: Shapes) -> str:
    """How many coefficients there are and where, in words."""
    total = sum(array.size for array in values.values())
    tensors: dict[str, int] = {}
    for name, unit in granularity.units.items():
        tensors[unit] = tensors.get(unit, 0) + _layers(name, shapes[name])
    where = ", ".join(f"{count} tensors {unit}" for unit, count in tensors.items())
    return f"{total:,} coefficients" + (f" ({where})" if where else "")


class _Split(NamedTuple):
    """How one tensor is split.

    Attributes:
        count: Number of coefficients of an expert.
        expand: From `[..., K, count]` to the scale.
        unit: How the tensor shares coefficients, in words.
    """

    count: int
    expand: Callable[[Array], Array]
    unit: str


def _along(shape: tuple[int, ...], axis: int, count: int, unit: str) -> _Split:
    """`count` equal parts along an axis."""

    def expand(values: Array) -> Array:
        if count != shape[axis]:
            values = jnp.repeat(values, shape[axis] // count, axis=-1)
        tail = [size if position == axis else 1 for position, size in enumerate(shape)]
        return values.reshape(*values.shape[:-1], *tail)

    return _Split(count, expand, unit)


def _pieces(count: int) -> _Split:
    """Pieces of the flattened tensor."""
    return _Split(count, lambda values: values[..., None], f"in {count} pieces")


def _split(
    shapes: Shapes,
    split: Callable[[str, tuple[int, ...]], _Split | None],
    prepare: Callable[[str, LoadedDelta], Delta] = unprepared,
    vectors: bool = False,
    tables: bool = False,
) -> Granularity:
    """A granularity with tensors split into parts, one group per parameter.

    Args:
        shapes: Of the parameters.
        split: From name and shape (without L) to how it is split, or None for not at all.
        prepare: For the deltas of parameters that are split.
        vectors: Whether vectors may be split too.
        tables: Whether embedding tables may be split too.
    """
    splits = {}
    for name, shape in shapes.items():
        own = tensor_shape(name, shape)
        found = split(name, own) if can_be_split(name, own, vectors, tables) else None
        if found is not None and found.count > 1:
            splits[name] = found

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


def _grouped(shapes: Shapes, group_of: Callable[[str], str], unit: str) -> Granularity:
    """A granularity with whole tensors in its groups.

    Args:
        shapes: Of the parameters.
        group_of: From the name of a tensor, without `*`, to its group. The layers of a stack may
            be in groups of their own, and those groups may hold tensors outside of the stack.
        unit: How tensors share coefficients, in words.
    """
    members = {name: [group_of(each) for each in tensors_of(name, shapes[name])] for name in shapes}
    used = {group for groups in members.values() for group in groups}

    def init(start: PerTensor) -> Values:
        collected: dict[str, list[Array]] = {group: [] for group in sorted(used)}
        for name, groups in members.items():
            for group, values in zip(groups, start[name], strict=True):
                collected[group].append(values)
        means = {group: _mean(jnp.stack(each))[None] for group, each in collected.items()}
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


def _mean(values: Float[Array, "N ..."]) -> Float[Array, "..."]:
    """The mean over the first axis; exact where all are equal, as at a constant start."""
    return values[0] + (values - values[0]).mean(0)


def _broadcastable(
    name: str, shape: tuple[int, ...], values: Float[Array, "G K"]
) -> Float[Array, "..."]:
    """The scale of a parameter that is not split: `[K, 1, ...]`, or `[L, K, 1, ...]`."""
    if not is_stacked(name):
        return values[0].reshape(-1, *(1 for _ in shape))
    values = jnp.broadcast_to(values, (shape[0], values.shape[1]))
    return values.reshape(*values.shape, *(1 for _ in shape[1:]))


def can_be_split(
    name: str, shape: tuple[int, ...], vectors: bool = False, tables: bool = False
) -> bool:
    """Whether parts of a tensor may have coefficients of their own.

    Rows of an embedding table are tokens, most of which the calibration data never shows; entries
    of a vector are too few examples of anything.
    """
    if matches(name, _TABLES) and not tables:
        return False
    return len(shape) >= 2 or (vectors and len(shape) == 1)


_TABLES = ("*embed*", "shared.weight", "*relative_attention_bias.weight")
"""What tables that are read by rows are called; the last two are T5's."""


def _pieces_of(
    name: str, shapes: Shapes, pieces: int | Mapping[str, int], tables: bool = False
) -> list[int]:
    """The number of pieces of each tensor that a parameter stands for."""
    shape = shapes[name]
    own = tensor_shape(name, shape)
    if not can_be_split(name, own, tables=tables):
        return [1] * _layers(name, shape)
    counts = []
    for each in tensors_of(name, shape):
        count = pieces
        if not isinstance(pieces, int):
            count = next((n for pattern, n in pieces.items() if matches(each, [pattern])), 1)
        if count > prod(own):
            raise InputError(
                f"{each} has {prod(own)} entries and cannot be cut into {count} pieces"
            )
        counts.append(count)
    most = max(counts)
    if len(set(counts)) > 1 and (prod(own) % most or any(most % count for count in counts)):
        raise InputError(
            f"the layers of {name} cannot be cut into "
            f"{', '.join(map(str, counts))} pieces; each number must divide the largest, and that "
            f"one the tensor's {prod(own)} entries"
        )
    return counts


def _layers(name: str, shape: tuple[int, ...]) -> int:
    return shape[0] if is_stacked(name) else 1


def layer_of(name: str, names: Iterable[str]) -> str:
    """The layer that a parameter belongs to, among the parameters `names` of one model.

    `encoder.layer.*.output.dense.weight` is in `encoder.layer.*`; a parameter outside the numbered
    blocks is in the outermost module that holds none of them.
    """
    block = numbered_block(name)
    if block:
        return block
    holders = {
        ".".join(parts[:depth])
        for other in names
        if (parts := numbered_block(other).split(".")[:-1])
        for depth in range(1, len(parts) + 1)
    }
    parts = name.split(".")
    for depth in range(1, len(parts)):
        module = ".".join(parts[:depth])
        if module not in holders:
            return module
    return name
