"""Comparison of two coefficients files: what changed, where, and how much."""

import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adamerge_jax.coefficients.file import Coefficients, Source
from adamerge_jax.coefficients.granularities import same_options
from adamerge_jax.coefficients.identities import other_contents
from adamerge_jax.errors import InputError
from adamerge_jax.parameter_names import layer_of
from adamerge_jax.report.plain_text import one_line

_LAYERS_SHOWN = 10
"""The number of layers that are printed, those that changed most."""


class ExpertChange(NamedTuple):
    """The differences between one expert's coefficients.

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
    """The differences between two coefficients files.

    Attributes:
        fields: Other fields that differ: name, in the first file, in the second.
        per_tensor: True where means per tensor are compared, because granularities differ.
        compared: Number of groups, or tensors, that both files have.
        unmatched: Number of groups, or tensors, that only the first has, and only the second.
        experts: The changes of the experts that both files have.
        layers: Mean magnitude of the differences by layer and expert, `[K]`, largest first.
        differences: Mean of the second file's coefficients less the first's, by group, `[K]`.
        by_tensor: True where groups are tensors.
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
        first: The coefficients to compare with.
        second: The coefficients to compare; where they are larger, differences are positive.

    Returns:
        What differs. `experts` has for each its `name`, the means `first` and `second`, the mean
        magnitude of `change`, the `largest` with its place `where`, and the `correlation`; `layers`
        and `differences` have changes by layer and group, `[K]`.

    Raises:
        InputError: The files have no expert, or no tensor, in common.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> import adamerge_jax as am
        >>> base = {"kernel": jnp.zeros((2, 2))}
        >>> experts = [{"kernel": jnp.eye(2)}, {"kernel": -jnp.eye(2)}]
        >>> data = [np.ones((20, 2), np.float32)] * 2
        >>> def forward(parameters, inputs):
        ...     return inputs @ parameters["kernel"]
        >>> merged = am.merge(base, experts, forward, data, steps=2, progress=False)
        >>> [expert.name for expert in am.compare(merged.coefficients, merged.coefficients).experts]
        ['expert_0', 'expert_1']
    """
    names = [name for name in first.names if name in second.names]
    if not names:
        raise InputError(
            f"the files have no expert in common: {', '.join(first.names)} and "
            f"{', '.join(second.names)}"
        )
    fields = tuple(_differing_fields(first, second))
    first, second = first.of_experts(names), second.of_experts(names)
    one_by_one = first.granularity == second.granularity and same_options(
        first.granularity_options, second.granularity_options
    )
    a, b = (file.values if one_by_one else file.per_tensor() for file in (first, second))
    common = [group for group in a if group in b and a[group].shape == b[group].shape]
    if not common:
        raise InputError(
            f"the files have nothing in common to compare: {next(iter(a))} is in one of them, "
            f"{next(iter(b))} in the other; they are of other models"
        )
    sizes = {group: float(np.prod(first.shapes.get(group, ()))) for group in common}
    a, b = ({g: values[g].reshape(len(names), -1) for g in common} for values in (a, b))
    return Comparison(
        fields,
        not one_by_one,
        len(common),
        tuple(
            len(file.values if one_by_one else file.shapes) - len(common)
            for file in (first, second)
        ),
        tuple(_expert_changes(names, a, b, sizes)),
        _by_layer({group: np.abs(b[group] - a[group]).mean(1) for group in common}, sizes),
        {group: (b[group] - a[group]).mean(1) for group in common},
        set(first.values if one_by_one else first.shapes) == set(first.shapes),
    )


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints what differs, how much for each expert, and in which layers most."""
    if comparison.fields:
        table = Table(title="What differs")
        for column in ("", "first", "second"):
            table.add_column(column, overflow="fold")
        for row in comparison.fields:
            table.add_row(*map(_text, row))
        console.print(table)
    groups = "tensors" if comparison.by_tensor else "groups of tensors"
    only_first, only_second = comparison.unmatched
    console.print(
        f"compared: {comparison.compared} {groups}"
        f"{' by their means, as granularities differ' if comparison.per_tensor else ''}"
        f"{f', {only_first} only in the first' if only_first else ''}"
        f"{f', {only_second} only in the second' if only_second else ''}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(title="Coefficients, second less first")
    table.add_column("expert", no_wrap=True)
    for column in ("mean before", "after", "mean change", "largest", "correlation"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("largest in", overflow="fold")
    for expert in comparison.experts:
        table.add_row(
            _text(expert.name),
            *(f"{mean:.3f}" for mean in (expert.first, expert.second, expert.change)),
            f"{expert.largest:+.3f}",
            "" if np.isnan(expert.correlation) else f"{expert.correlation:.3f}",
            _text(expert.where),
        )
    console.print(table)
    table = Table(title="Layers that changed most (mean change)")
    table.add_column("layer", overflow="fold")
    for expert in comparison.experts:
        table.add_column(_text(expert.name), justify="right", no_wrap=True)
    for layer, changes in comparison.layers[:_LAYERS_SHOWN]:
        table.add_row(_text(layer), *(f"{change:.3f}" for change in changes))
    console.print(table)


def _text(text: str) -> Text:
    """Returns a text of a file for a table: no style, whatever brackets are in it."""
    return Text(one_line(text, longest=1000))


def _expert_changes(
    names: list[str],
    first: Mapping[str, Float[np.ndarray, "K N"]],
    second: Mapping[str, Float[np.ndarray, "K N"]],
    sizes: Mapping[str, float],
) -> Iterator[ExpertChange]:
    """Yields the change of each expert; a group's coefficients share the weight of its size."""
    counts = {group: values.shape[1] for group, values in first.items()}
    groups = np.repeat(list(counts), list(counts.values()))
    weights = np.concatenate([np.full(n, sizes[group] / n) for group, n in counts.items()])
    weights /= weights.sum()
    before, after = (np.concatenate(list(v.values()), 1).astype(float) for v in (first, second))
    for name, x, y in zip(names, before, after, strict=True):
        peak = np.abs(y - x).argmax()
        yield ExpertChange(
            name,
            float(weights @ x),
            float(weights @ y),
            float(weights @ np.abs(y - x)),
            float((y - x)[peak]),
            str(groups[peak]),
            _correlation(x, y, weights),
        )


def _correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    x, y = x - weights @ x, y - weights @ y
    scale = np.sqrt((weights @ x**2) * (weights @ y**2))
    # What is under rounding of float32 coefficients is no variation.
    return float(weights @ (x * y) / scale) if scale > 1e-12 else float("nan")


def _by_layer(
    changes: Mapping[str, Float[np.ndarray, " K"]], sizes: Mapping[str, float]
) -> tuple[tuple[str, Float[np.ndarray, " K"]], ...]:
    """Returns the mean of the changes in each layer, largest first."""
    totals: dict[str, np.ndarray] = {}
    weights: dict[str, float] = {}
    for group, change in changes.items():
        layer = layer_of(group, changes)
        totals[layer] = totals.get(layer, 0) + sizes[group] * change
        weights[layer] = weights.get(layer, 0) + sizes[group]
    layers = [(layer, totals[layer] / weights[layer]) for layer in totals]
    return tuple(sorted(layers, key=lambda layer: -layer[1].mean()))


def _differing_fields(first: Coefficients, second: Coefficients) -> Iterator[tuple[str, str, str]]:
    """Yields the fields other than values that differ: name, in the first, in the second."""
    before, after = (
        {model.name: model for model in (file.base, *file.experts)} for file in (first, second)
    )
    for name in {**before, **after}:
        models: list[Source | None] = [before.get(name), after.get(name)]
        if None in models or other_contents(models[:1], models[1:]):
            yield name, *(model.in_words if model else "not in it" for model in models)
    for field in ("granularity", "constraint", "objective", "seed", "step"):
        a, b = getattr(first, field), getattr(second, field)
        if a != b:
            yield field, str(a), str(b)
    options = [file.granularity_options for file in (first, second)]
    if not same_options(*options):
        yield "granularity options", *map(json.dumps, options)
    merges = [file.initial_merge for file in (first, second)]
    if merges[0] != merges[1]:
        yield "added to", *("the base" if m is None else f"merge by {m.in_words}" for m in merges)
    for field in ("interference", "scaled", "started_from"):
        a, b = getattr(first, field), getattr(second, field)
        if a != b:
            yield field.replace("_", " "), str(a or "none"), str(b or "none")
