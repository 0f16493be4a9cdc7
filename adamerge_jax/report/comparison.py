"""Two coefficients files: what changed, where, how much."""

import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from adamerge_jax.coefficients.file import Coefficients, Source
from adamerge_jax.coefficients.granularities import same_options
from adamerge_jax.coefficients.identities import other_contents
from adamerge_jax.errors import InputError
from adamerge_jax.parameter_names import layer_of


class ExpertChange(NamedTuple):
    """How one expert's coefficients differ.

    Attributes:
        name: The expert.
        first: Mean of the first file's; tensors count by their number of parameters.
        second: Mean of the second file's.
        change: Mean magnitude of the differences.
        largest: The difference that is largest in magnitude, with its sign.
        where: The group, or the tensor, that it is in.
        correlation: Pearson's, over all that is compared; NaN where one file has one value.
    """

    name: str
    first: float
    second: float
    change: float
    largest: float
    where: str
    correlation: float


class Comparison(NamedTuple):
    """What two coefficients files have in common, and what not.

    Attributes:
        fields: What else differs: name, in the first file, in the second.
        per_tensor: Whether means per tensor are compared, because granularities differ.
        compared: Number of groups, or tensors, that both files have.
        unmatched: Number of groups, or tensors, that only the first has, and only the second.
        experts: By expert that both files have.
        layers: Mean magnitude of the differences by layer and expert, `[K]`, largest first.
        differences: Mean of the second file's coefficients less the first's, by group, `[K]`.
        by_tensor: Whether groups are tensors.
    """

    fields: tuple[tuple[str, str, str], ...]
    per_tensor: bool
    compared: int
    unmatched: tuple[int, int]
    experts: tuple[ExpertChange, ...]
    layers: tuple[tuple[str, Float[np.ndarray, " K"]], ...]
    differences: Mapping[str, Float[np.ndarray, " K"]]
    by_tensor: bool


def compare(first: Coefficients, second: Coefficients) -> Comparison:
    """Compares coefficients, those of one granularity one by one, others by their mean per tensor.

    Experts are matched by name, tensors by theirs.

    Args:
        first: What is compared with.
        second: What is compared; where it has more, differences are positive.

    Raises:
        InputError: The files have no expert, or no tensor, in common.
    """
    names = [name for name in first.names if name in second.names]
    if not names:
        raise InputError(
            f"the files have no expert in common: {', '.join(first.names)} and "
            f"{', '.join(second.names)}"
        )
    fields = tuple(_fields(first, second))
    first, second = first.of_experts(names), second.of_experts(names)
    one_by_one = first.granularity == second.granularity and same_options(
        first.granularity_options, second.granularity_options
    )
    a, b = (each.values if one_by_one else each.per_tensor() for each in (first, second))
    common = [group for group in a if group in b and a[group].shape == b[group].shape]
    if not common:
        raise InputError(
            f"the files have nothing in common to compare: {next(iter(a))} is in one of them, "
            f"{next(iter(b))} in the other; they are of other models"
        )
    sizes = {group: float(np.prod(first.shapes.get(group, ()))) for group in common}
    differences = {group: b[group] - a[group] for group in common}
    return Comparison(
        fields,
        not one_by_one,
        len(common),
        (len(a) - len(common), len(b) - len(common)),
        tuple(_expert_change(k, name, a, b, sizes) for k, name in enumerate(names)),
        _by_layer(differences, sizes),
        {group: own.reshape(len(names), -1).mean(1) for group, own in differences.items()},
        set(a) == set(first.shapes),
    )


def _expert_change(
    position: int,
    name: str,
    a: Mapping[str, np.ndarray],
    b: Mapping[str, np.ndarray],
    sizes: Mapping[str, float],
) -> ExpertChange:
    pairs = {group: (a[group][position].ravel(), b[group][position].ravel()) for group in sizes}
    weights = np.concatenate(
        [np.full(own.size, sizes[g] / own.size) for g, (own, _) in pairs.items()]
    )
    x, y = (np.concatenate(each).astype(float) for each in zip(*pairs.values(), strict=True))
    peaks = {g: float(max(v - u, key=abs)) for g, (u, v) in pairs.items()}
    where = max(peaks, key=lambda group: abs(peaks[group]))
    weights /= weights.sum()
    return ExpertChange(
        name,
        float(weights @ x),
        float(weights @ y),
        float(weights @ np.abs(y - x)),
        peaks[where],
        where,
        _correlation(x, y, weights),
    )


def _correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    x, y = x - weights @ x, y - weights @ y
    scale = np.sqrt((weights @ x**2) * (weights @ y**2))
    # What is under rounding of float32 coefficients is no variation.
    return float(weights @ (x * y) / scale) if scale > 1e-12 else float("nan")


def _by_layer(
    changes: Mapping[str, np.ndarray], sizes: Mapping[str, float]
) -> tuple[tuple[str, np.ndarray], ...]:
    """Mean magnitude of the differences by layer, largest first."""
    totals: dict[str, np.ndarray] = {}
    weights: dict[str, float] = {}
    for group, change in changes.items():
        layer = layer_of(group, changes)
        mean = np.abs(change).reshape(len(change), -1).mean(1)
        totals[layer] = totals.get(layer, 0) + sizes[group] * mean
        weights[layer] = weights.get(layer, 0) + sizes[group]
    layers = [(layer, totals[layer] / weights[layer]) for layer in totals]
    return tuple(sorted(layers, key=lambda own: -own[1].mean()))


def _fields(first: Coefficients, second: Coefficients) -> Iterator[tuple[str, str, str]]:
    """What differs besides the values: name, in the first, in the second."""
    yield from _models("base", first.base, second.base)
    theirs = {expert.name: expert for expert in second.experts}
    for expert in first.experts:
        yield from _models(expert.name, expert, theirs.pop(expert.name, None))
    for expert in theirs.values():
        yield from _models(expert.name, None, expert)
    for field in ("granularity", "constraint", "objective", "seed", "step"):
        a, b = getattr(first, field), getattr(second, field)
        if a != b:
            yield field, str(a), str(b)
    options = [each.granularity_options for each in (first, second)]
    if not same_options(*options):
        yield "granularity options", *map(json.dumps, options)
    for field in ("interference", "scaled", "started_from"):
        a, b = getattr(first, field), getattr(second, field)
        if a != b:
            yield field.replace("_", " "), str(a or "none"), str(b or "none")


def _models(name: str, a: Source | None, b: Source | None) -> Iterator[tuple[str, str, str]]:
    """What differs of one model."""
    if a is None or b is None or other_contents([a], [b]):
        yield name, *(each.in_words if each else "not in it" for each in (a, b))
