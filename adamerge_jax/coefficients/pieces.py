"""Granularities by pieces of the flattened tensor: contiguous ones, or random parts."""

from collections.abc import Mapping
from math import prod

import jax.numpy as jnp
from jaxtyping import Array

from adamerge_jax.coefficients.granularity import (
    Granularity,
    PerTensor,
    Shapes,
    Split,
    Values,
    can_be_split,
    require_bool,
    require_whole,
    split_tensors,
)
from adamerge_jax.errors import InputError
from adamerge_jax.parameter_names import (
    is_stacked,
    layers_of,
    matches,
    tensor_shape,
    tensors_of,
)


def chunk(shapes: Shapes, pieces: int | Mapping[str, int], tables: bool = False) -> Granularity:
    """One coefficient per expert and contiguous piece of the flattened tensor (Expert Merging).

    A piece holds `ceil(size / pieces)` entries, the last one perhaps fewer. Vectors have one
    coefficient each, and embedding tables too.

    Args:
        shapes: Shapes of the parameters.
        pieces: Number of pieces, or numbers by name pattern: the first pattern that fits counts,
            and a tensor that fits none is not cut. Layers of one stack that differ in their number
            of pieces must have numbers that divide the largest, and that one the tensor's size.
        tables: True where embedding tables are cut as well; see `row`.

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
    require_bool("tables", tables)
    if isinstance(pieces, Mapping):
        for pattern, number in pieces.items():
            if not isinstance(pattern, str):
                raise InputError(f"pieces are for {pattern!r}, expected a name pattern in quotes")
            require_whole(f"the number of pieces of {pattern!r}", number, 1)
    else:
        require_whole("pieces", pieces, 1)
    counts = {name: _pieces_of(name, shapes, pieces, tables) for name in shapes}

    def split(name: str, shape: tuple[int, ...]) -> Split | None:
        most = max(counts[name])
        return _pieces(most) if most > 1 else None

    uniform = split_tensors(
        shapes,
        split,
        prepare=lambda name, delta: delta.in_pieces(max(counts[name]), stacked=is_stacked(name)),
        tables=tables,
    )._replace(cuts_rows=True)
    uneven = {name: counts[name] for name in shapes if len(set(counts[name])) > 1}
    if not uneven:
        return uniform

    # Layers of one stack with unlike numbers of pieces: a group for each, and in the scan as many
    # pieces as the most finely cut layer has, some of which share their coefficient.
    even = [name for name in shapes if name not in uneven]

    def init(start: PerTensor) -> Values:
        values = uniform.init(start)
        ragged = {
            tensor: jnp.broadcast_to(coefficients[None, :, None], (1, len(coefficients), count))
            for name in uneven
            for tensor, coefficients, count in zip(
                tensors_of(name, shapes[name]), start[name], counts[name], strict=True
            )
        }
        return {name: values[name] for name in even} | ragged

    def scales(values: Values) -> dict[str, Array]:
        stacked = {name: values[name] for name in even}
        for name in uneven:
            most = max(counts[name])
            layers = [
                jnp.repeat(values[tensor], most // count, axis=2)
                for tensor, count in zip(tensors_of(name, shapes[name]), counts[name], strict=True)
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
        shapes: Shapes of the parameters.
        groups: Number of groups of every tensor.
        seed: Seed of the assignment.

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
    return split_tensors(
        shapes,
        lambda name, shape: _pieces(groups)._replace(unit=f"in {groups} random parts"),
        prepare=lambda name, delta: delta.in_pieces(groups, stacked=is_stacked(name), seed=seed),
    )._replace(cuts_rows=True)


def _pieces(count: int) -> Split:
    """Returns the split into pieces of the flattened tensor."""
    return Split(count, lambda values: values[..., None], f"in {count} pieces")


def _pieces_of(
    name: str, shapes: Shapes, pieces: int | Mapping[str, int], tables: bool = False
) -> list[int]:
    """Returns the number of pieces of each tensor that a parameter stands for."""
    shape = shapes[name]
    of_tensor = tensor_shape(name, shape)
    if not can_be_split(name, of_tensor, tables=tables):
        return [1] * layers_of(name, shape)
    size = prod(of_tensor)
    counts = []
    for tensor in tensors_of(name, shape):
        count = pieces
        if not isinstance(pieces, int):
            count = next((n for pattern, n in pieces.items() if matches(tensor, [pattern])), 1)
        if count > size:
            raise InputError(f"{tensor} has {size} entries and cannot be cut into {count} pieces")
        counts.append(count)
    most = max(counts)
    if len(set(counts)) > 1 and (size % most or any(most % count for count in counts)):
        raise InputError(
            f"the layers of {name} cannot be cut into "
            f"{', '.join(map(str, counts))} pieces; each number must divide the largest, and that "
            f"one the tensor's {size} entries"
        )
    return counts
