"""One coefficient for each expert of a mixture."""

import functools
import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from adamerge_jax.coefficients.granularity import (
    Granularity,
    PerTensor,
    Shapes,
    Values,
    group_tensors,
    mean_of_tensors,
)
from adamerge_jax.errors import InputError
from adamerge_jax.parameter_names import is_stacked, layer_of, tensor_shape, tensors_of


def mixture_expert(shapes: Shapes) -> Granularity:
    """One coefficient per fine-tuned expert and expert of a mixture, one per layer elsewhere.

    The experts of a mixture are tensors of their own (`mlp.experts.3.up_proj.weight`) or lie along
    the first axis of one (`mlp.experts.gate_up_proj`); coefficients are the same for both. Routers,
    attention and norms share those of their layer.

    Args:
        shapes: Shapes of the parameters.

    Raises:
        InputError: No parameter is one of a mixture's experts.

    Examples:
        >>> from adamerge_jax.coefficients.granularities import constant, mixture_expert
        >>> shapes = {"0.mlp.gate.weight": (2, 4)}  # the router
        >>> shapes |= {f"0.mlp.experts.{number}.up.weight": (6, 4) for number in range(2)}
        >>> values = mixture_expert(shapes).init(constant(shapes, experts=3, value=0.3))
        >>> {group: array.shape for group, array in values.items()}  # [G, K, ...]
        {'0': (1, 3), '0.mlp.experts': (1, 3, 2)}
    """
    all_tensors = [tensor for name, shape in shapes.items() for tensor in tensors_of(name, shape)]
    members: dict[str, list[_Place]] = {}  # the layers of each parameter of a mixture
    for name, shape in shapes.items():
        places = [_place(tensor, tensor_shape(name, shape)) for tensor in tensors_of(name, shape)]
        if in_mixtures := [place for place in places if place is not None]:
            members[name] = in_mixtures
    if shapes and not members:
        raise InputError(
            "no merged parameter is an expert of a mixture (*.experts.*); take another granularity"
        )
    others = group_tensors(
        {name: shape for name, shape in shapes.items() if name not in members},
        lambda tensor: layer_of(tensor, all_tensors),
        "by layer",
    )
    numbers: dict[str, set[int]] = defaultdict(set)
    for mixture, experts in itertools.chain(*members.values()):
        numbers[mixture].update(experts)
    columns = {
        mixture: {number: column for column, number in enumerate(sorted(of_mixture))}
        for mixture, of_mixture in numbers.items()
    }

    def init(start: PerTensor) -> Values:
        collected: dict[tuple[str, int], list[Array]] = defaultdict(list)
        for name, places in members.items():
            for (mixture, experts), values in zip(places, start[name], strict=True):
                for number in experts:
                    collected[mixture, number].append(values)
        result = dict(others.init(start))
        for mixture, of_mixture in columns.items():
            by_expert = [mean_of_tensors(jnp.stack(collected[mixture, n])) for n in of_mixture]
            result[mixture] = jnp.stack(by_expert, axis=-1)[None].astype(jnp.float32)
        return {group: result[group] for group in sorted(result)}

    def scales(values: Values) -> dict[str, Array]:
        # Once for all parameters of a stack: a mixture may have hundreds of them.
        joined = functools.cache(lambda mixtures: jnp.concatenate([values[m] for m in mixtures]))

        def scale(name: str, places: Sequence[_Place]) -> Array:
            mixtures = tuple(place.mixture for place in places)
            firsts = [columns[place.mixture][place.experts[0]] for place in places]
            count = len(places[0].experts)  # all from 0 where they are several, so neighbours
            if len(set(firsts)) == 1 and len({len(columns[mixture]) for mixture in mixtures}) == 1:
                rows = jax.lax.slice_in_dim(joined(mixtures), firsts[0], firsts[0] + count, axis=2)
            else:
                rows = jnp.concatenate(
                    [
                        jax.lax.slice_in_dim(values[mixture], first, first + count, axis=2)
                        for mixture, first in zip(mixtures, firsts, strict=True)
                    ]
                )
            leading = rows.shape[:2] if is_stacked(name) else rows.shape[1:2]
            axes = len(tensor_shape(name, shapes[name]))
            return rows.reshape(*leading, *(count, *[1] * axes)[:axes])

        result = others.scales(values)
        result |= {name: scale(name, places) for name, places in members.items()}
        return {name: result[name] for name in shapes}

    units = dict.fromkeys(members, "by expert of a mixture")
    return Granularity(init, scales, units={name: units.get(name, "by layer") for name in shapes})


class _Place(NamedTuple):
    """The place of a tensor in a mixture.

    Attributes:
        mixture: The name of the mixture.
        experts: The numbers of the experts in the tensor: one, or all from 0 on.
    """

    mixture: str
    experts: Sequence[int]


def _place(name: str, shape: tuple[int, ...]) -> _Place | None:
    """Returns the place of a tensor in a mixture; None outside of mixtures."""
    before, dot, after = name.rpartition(".experts.")
    number, *rest = after.split(".")
    if dot and number.isdecimal() and rest:
        return _Place(f"{before}.experts", [int(number)])
    if dot and not rest and len(shape) >= 2:
        return _Place(f"{before}.experts", range(shape[0]))
    return None
