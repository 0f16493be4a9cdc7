"""Coefficients in numbers and words: means by layer, their spread, and the facts of a file."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.parameter_names import layer_of
from adamerge_jax.registry import choice_in_words
from adamerge_jax.report.plain_text import one_line

REACH = 2.0
"""The distance to 0, 1 and the start within which coefficients are sensible. Of 9,400 learned for
rows of the quickstart's experts, without a constraint, the outermost are 1.3 below 0 and 0.7 over
1."""

_LEAST_REACH = 0.05
"""The least distance from the start to the strongest colours, so that rounding has none of them."""


def print_coefficients(coefficients: Coefficients, console: Console) -> None:
    """Prints the origin of the coefficients and, layer by layer, their mean per expert."""
    alone, initial = coefficients.of_method_alone, coefficients.initial_merge
    facts = {
        "base": coefficients.base.source,
        "experts": ", ".join(f"{e.name} ({e.source})" for e in coefficients.experts),
    }
    if initial is not None:
        facts["merge by"] = initial.in_words
        steps = ", ".join(choice_in_words(step.name, step.options) for step in initial.interference)
        facts["its steps"] = steps or "none"
        facts["its tensors"] = (
            "stored in the file" if initial.stored else "computed from the models by fold"
        )
        if coefficients.initial_tensors and not initial.stored:
            facts["its tensors"] += ", statistics of batch normalisation stored in the file"
    if alone:
        facts["learned"] = "nothing: the merge is that of the method alone"
        facts["merged tensors"] = str(len(coefficients.parameters))
        _print_facts(facts, console)
        return
    facts |= {
        "coefficients": str(count_coefficients(coefficients)),
        "granularity": coefficients.granularity,
        "interference": interference_in_words(coefficients) or "none",
        "constraint": coefficients.constraint,
        "objective": coefficients.objective,
        **_effort(coefficients),
        "started from": coefficients.started_from or "nothing learned before",
        "scaled since": scaled_in_words(coefficients) or "no",
        "merged tensors": str(len(coefficients.parameters)),
    }
    _print_facts(facts, console)
    table = Table(title="Mean coefficient")
    table.add_column("layer", no_wrap=True)
    for expert in coefficients.names:
        table.add_column(Text(one_line(expert)), justify="right")
    for layer, means in zip(*layer_means(coefficients), strict=True):
        table.add_row(Text(one_line(layer)), *(f"{mean:.3f}" for mean in means))
    console.print(table)
    if warning := range_warning(coefficients):
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)


def _print_facts(facts: Mapping[str, str], console: Console) -> None:
    for name, fact in facts.items():
        text = one_line(fact, longest=10_000)
        console.print(f"{name:14} {text}", highlight=False, soft_wrap=True)


def count_coefficients(coefficients: Coefficients) -> int:
    """Returns the number of coefficients of all experts."""
    return sum(values.size for values in coefficients.values.values())


def group_means(coefficients: Coefficients) -> dict[str, Float[np.ndarray, " K"]]:
    """Returns the mean of each group of coefficients for each expert."""
    return {
        group: values.reshape(len(values), -1).mean(1, dtype=np.float64)
        for group, values in coefficients.values.items()
    }


def layer_means(coefficients: Coefficients) -> tuple[list[str], Float[np.ndarray, "layers K"]]:
    """Returns the layers, and how much of each expert goes into each: the mean over its groups.

    Args:
        coefficients: The coefficients of K experts.

    Returns:
        Names of the layers in their order, and the means, `[layers, K]`.

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
        >>> layers, means = am.layer_means(merged.coefficients)
        >>> layers, means.shape
        (['kernel'], (1, 2))
    """
    layers: dict[str, list[np.ndarray]] = {}
    for group, means in group_means(coefficients).items():
        layers.setdefault(layer_of(group, coefficients.values), []).append(means)
    names = sorted(layers, key=natural_order)
    return names, np.stack([np.mean(layers[name], axis=0) for name in names])


def start_of(coefficients: Coefficients) -> float:
    """Returns the value that maps are drawn around: the start, or 0 where it is not known."""
    start = coefficients.initial
    return 0.0 if start is None or coefficients.is_searched else start


def range_around_start(
    coefficients: Coefficients, means: Float[np.ndarray, "..."]
) -> tuple[float, float]:
    """Returns the two ends of a map's colours, as far below the start as above it.

    Args:
        coefficients: The coefficients.
        means: The numbers in the map; NaN where it is empty.
    """
    start = start_of(coefficients)
    distances = np.abs(means[np.isfinite(means)] - start)
    reach = max(float(distances.max(initial=0)), _LEAST_REACH)
    return start - reach, start + reach


def unmoved(coefficients: Coefficients) -> dict[str, Bool[np.ndarray, " K"]]:
    """Returns by group True for the experts whose coefficients are all where they started.

    So are those that make no difference, as where an expert changed nothing. Where none was
    learned, none is taken for one.
    """
    start, nothing = coefficients.initial, np.zeros(len(coefficients.experts), bool)
    if start is None or not coefficients.step or coefficients.is_searched:
        return dict.fromkeys(coefficients.values, nothing)
    factors = [coefficients.scaled.get(name, 1.0) for name in coefficients.names]
    starts = np.float32(start) * np.array(factors, np.float32)
    return {
        group: (values.reshape(len(values), -1) == starts[:, None]).all(1)
        for group, values in coefficients.values.items()
    }


class LayerSpread(NamedTuple):
    """The coefficients of one expert in one layer.

    Attributes:
        mean: The mean over the layer's groups; NaN where all are where they started.
        low: A tenth of them are under this.
        high: A tenth of them are over this.
    """

    mean: float
    low: float
    high: float


def layer_spreads(coefficients: Coefficients) -> tuple[list[str], list[list[LayerSpread]]]:
    """Returns the layers, and for each of them the spread of every expert's coefficients."""
    layers, means = layer_means(coefficients)
    groups: dict[str, list[str]] = {layer: [] for layer in layers}
    for group in coefficients.values:
        groups[layer_of(group, coefficients.values)].append(group)
    still = unmoved(coefficients)
    rows = []
    for layer, row in zip(layers, means, strict=True):
        spread = []
        for position, mean in enumerate(row):
            parts = (coefficients.values[group][position].ravel() for group in groups[layer])
            low, high = np.quantile(np.concatenate(list(parts)).astype(np.float64), [0.1, 0.9])
            is_empty = all(still[group][position] for group in groups[layer])
            spread.append(LayerSpread(np.nan if is_empty else float(mean), float(low), float(high)))
        rows.append(spread)
    return layers, rows


def moved_means(coefficients: Coefficients) -> dict[str, Float[np.ndarray, " K"]]:
    """Returns `group_means`, NaN for an expert whose coefficients are all where they started."""
    still = unmoved(coefficients)
    return {
        group: np.where(still[group], np.nan, means)
        for group, means in group_means(coefficients).items()
    }


def _effort(coefficients: Coefficients) -> dict[str, str]:
    """Returns what it took to get the coefficients."""
    seed = f"seed {coefficients.seed}"
    if coefficients.is_searched:
        return {"found by": f"evaluation {coefficients.step}, {seed}"}
    return {"learned in": f"{coefficients.step} steps, {seed}"}


class Spread(NamedTuple):
    """The distribution of an expert's coefficients.

    Attributes:
        mean: Their mean.
        deviation: Their standard deviation.
        smallest: The smallest.
        largest: The largest.
    """

    mean: float
    deviation: float
    smallest: float
    largest: float


def spreads(coefficients: Coefficients) -> list[Spread]:
    """Returns the spread of each expert's coefficients, in the order of the experts."""
    result = []
    for position in range(len(coefficients.experts)):
        groups = (values[position].ravel() for values in coefficients.values.values())
        flat = np.concatenate(list(groups)).astype(np.float64)  # squares of 1e30 are too large
        result.append(Spread(*(float(f(flat)) for f in (np.mean, np.std, np.min, np.max))))
    return result


def range_warning(coefficients: Coefficients, name: Callable[[str], str] = one_line) -> str | None:
    """Returns a warning where coefficients are far from what a merge can be expected to need.

    That is more than `REACH` away from all of 0 (the base), 1 (the expert) and the start. A lower
    objective may lead there: it is no measure of how good the merge is.

    Args:
        coefficients: The learned coefficients.
        name: The function that writes an expert's name in the warning.

    Returns:
        None where all are within reach.
    """
    start = coefficients.initial
    near = (0.0, 1.0) if start is None else (0.0, 1.0, start)
    low, high = min(near) - REACH, max(near) + REACH
    outside = sum(
        int(((values < low) | (values > high)).sum()) for values in coefficients.values.values()
    )
    if not outside:
        return None
    experts = zip(coefficients.names, spreads(coefficients), strict=True)
    expert, value = max(
        ((expert, end) for expert, spread in experts for end in (spread.smallest, spread.largest)),
        key=lambda pair: max(low - pair[1], pair[1] - high),
    )
    origin = f"constraint {coefficients.constraint}"
    if start is not None:
        origin += f", start {start:g}"
    return (
        f"{outside} of {count_coefficients(coefficients)} coefficients are outside of {low:g} to "
        f"{high:g}, the farthest of {name(expert)} at {value:.4g} ({origin}); a low "
        "objective does not make such a merge good: look at its results, lower the learning rate, "
        "or take another constraint"
    )


def by_layer_and_kind(
    means: Mapping[str, Float[np.ndarray, " K"]],
) -> tuple[Float[np.ndarray, "K layers kinds"], list[str], list[str]]:
    """Arranges means of tensors by layer and kind of tensor; NaN where a layer has no such tensor.

    Returns:
        The means, the layers in their order, and the kinds, those of numbered layers first.
    """
    places = {}
    for name in means:
        layer = layer_of(name, means)
        places[name] = layer, name.removeprefix(layer).lstrip(".") or layer
    layers = sorted({layer for layer, _ in places.values()}, key=natural_order)
    numbered = {layer for layer in layers if layer.rpartition(".")[2].isdigit()}
    in_order = sorted(places.values(), key=lambda place: (place[0] not in numbered, place[1]))
    kinds = list(dict.fromkeys(kind for _, kind in in_order))
    maps = np.full((len(next(iter(means.values()))), len(layers), len(kinds)), np.nan)
    for name, (layer, kind) in places.items():
        maps[:, layers.index(layer), kinds.index(kind)] = means[name]
    return maps, layers, kinds


def natural_order(name: str) -> list[tuple[int, str, int]]:
    """Returns a key that sorts `layer.10` after `layer.9`, and `Dense_10` after `Dense_9`."""

    def key(part: str) -> tuple[int, str, int]:
        if part.isdigit():
            return int(part), "", -1
        stem = part.rstrip("0123456789")
        return -1, stem, int(part[len(stem) :] or -1)

    return [key(part) for part in name.split(".")]


def interference_in_words(coefficients: Coefficients) -> str:
    """Returns the interference steps with their options: `trim (density 0.2), elect_sign`."""
    return ", ".join(choice_in_words(step.name, step.options) for step in coefficients.interference)


def scaled_in_words(coefficients: Coefficients) -> str:
    """Returns the factors that coefficients were multiplied with since: `trec times 0.5`."""
    return ", ".join(f"{name} times {factor:g}" for name, factor in coefficients.scaled.items())
