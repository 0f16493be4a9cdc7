"""Where learning starts when something was learned before: an earlier run's coefficients.

A `WarmStart` gives each tensor its coefficients; `initial_values` turns it into coefficients of any
granularity. So another source of a start is one function that returns a `WarmStart`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adamerge_jax.checkpoints.mergekit import read_weights
from adamerge_jax.coefficients.constraints import CONSTRAINTS, Constraint
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.coefficients.granularities import (
    Granularity,
    Shapes,
    Values,
    constant,
    same_options,
)
from adamerge_jax.coefficients.identities import namesake, other_contents
from adamerge_jax.coefficients.transfer import carry
from adamerge_jax.errors import InputError
from adamerge_jax.interference import FittedStep
from adamerge_jax.parameter_names import is_stacked, stack_depths, tensor_shape, tensors_of, unstack
from adamerge_jax.pipeline.models import Models
from adamerge_jax.recipes.build import GranularityChoice, Method

_MOVED = 1e-4
"""From this difference on a coefficient was moved into the constraint's range, not rounded."""


class WarmStart(NamedTuple):
    """Where coefficients start.

    Attributes:
        scales: By tensor, without `*`: `[K, ...]` that broadcasts against `[K, *shape]`, or `[K]`.
            The experts are in the order of the recipe; NaN where nothing is known of one. Tensors
            of which nothing is known are left out.
        initial: Where coefficients start of which nothing is known.
        source: Where it comes from, for the coefficients file.
        notes: What a user should know of it, a sentence each.
        learned: Coefficients of these same experts, which a granularity that is the same takes as
            they are; NaN where nothing is known.
    """

    scales: Mapping[str, Float[np.ndarray, "K ..."]]
    initial: float
    source: str
    notes: tuple[str, ...] = ()
    learned: Coefficients | None = None


def open_warm_start(method: Method, models: Models, root: Path) -> WarmStart | None:
    """Reads the file that a method starts from, if there is one.

    Args:
        method: Names the file, and the value at which an expert starts that it does not know.
        models: The base and its experts.
        root: Folder that relative paths start from.

    Raises:
        InputError: See `start_from_file` and `start_from_mergekit`.
    """
    if method.start is None:
        return None
    file = root / Path(method.start).expanduser()
    if file.suffix in (".yaml", ".yml"):
        start = start_from_mergekit(file, models, initial=method.initial, source=method.start)
    else:
        try:
            coefficients = Coefficients.load(file)
        except InputError as error:
            raise InputError(f"coefficients.start: {error}") from error
        start = start_from_file(
            coefficients,
            models,
            initial=method.initial,
            other_base=method.other_base,
            source=method.start,
        )
        other = _other_interference(coefficients, method.interference)
        start = start._replace(notes=(*start.notes, *other))
    return start._replace(
        notes=(
            *start.notes,
            _how(start, method.stages[0].granularity),
            *_out_of_range(start, method.constraint),
        )
    )


def start_from_mergekit(file: Path, models: Models, *, initial: float, source: str) -> WarmStart:
    """A start at the weights of a mergekit file, one for each tensor and expert.

    Args:
        file: See `adamerge_jax.checkpoints.mergekit.read_weights`.
        models: The base and its experts, which the file names by the same paths or Hub names.
        initial: Where coefficients start of a tensor that the file says nothing of.
        source: Where it comes from, for the coefficients file.

    Raises:
        InputError: It is no such file, is of other models, or says what no coefficients can.
    """
    try:
        weights = read_weights(file, models.base, models.experts)
    except InputError as error:
        raise InputError(f"coefficients.start: {error}") from error
    return WarmStart(weights, initial, source)


def start_from_file(
    coefficients: Coefficients, models: Models, *, initial: float, other_base: bool, source: str
) -> WarmStart:
    """A start at learned coefficients, for experts of which some may be others.

    Experts are matched by name: one that was replaced by a newer fine-tune keeps its coefficients,
    one that is gone is ignored, and one that is new starts at `initial`. For a base of another
    size, coefficients are averaged per tensor and carried over by `carry`.

    Args:
        coefficients: The learned ones.
        models: The base and its experts.
        initial: Where coefficients start that were not learned.
        other_base: Whether the coefficients may be those of another base.
        source: Where they come from, for messages.

    Raises:
        InputError: No expert has coefficients, or the base is another one without permission.
    """
    base, *experts = models.sources
    names = [expert.name for expert in experts]
    known = [name for name in names if name in coefficients.names]
    if not known:
        raise InputError(
            f"coefficients.start: {source} was learned for {', '.join(coefficients.names)}, the "
            f"recipe has {', '.join(names)}; experts are matched by name, and none has the same"
        )
    change = other_contents([coefficients.base], [base])
    depths, here = _depths(coefficients), stack_depths(models.base.names)
    # A deeper base has all tensors of a shallower one, at other relative depths.
    same_size = all(
        name in models.base.names and models.base.shape(name) == shape
        for name, shape in coefficients.shapes.items()
    ) and (not change or all(here.get(stack) == depth for stack, depth in depths.items()))
    notes = _notes_on_experts(coefficients, models, known, initial, source)
    if change:
        words = f"{source} was {change['base']}"
        if not same_size:
            words += ", and is of another size or family"
        if not other_base:
            raise InputError(
                f"coefficients.start: {words}; coefficients.other_base: true starts from it all "
                "the same"
            )
        notes.append(words)
    if same_size:
        learned = _rearranged(coefficients, names)
        scales = _along_axes(learned)
    else:
        learned = None
        per_tensor = _rearranged(coefficients, names).per_tensor()
        scales = carry(per_tensor, depths, models.base.names)
        if not scales:
            raise InputError(
                f"coefficients.start: {source} was learned for tensors such as "
                f"{next(iter(coefficients.shapes))}, and the base has none of these names; start "
                "from a run of the same model family"
            )
        notes.append(
            "coefficients were carried over from a model of another size, layers by their relative "
            f"depth, each tensor ({len(scales)} of {len(models.base.names)}) at its twin's mean: "
            "they are a starting point and nothing more, the merge is only as good as what is "
            "learned from here"
        )
    return WarmStart(scales, initial, source, tuple(notes), learned)


def initial_values(
    start: WarmStart,
    granularity: Granularity,
    chosen: GranularityChoice,
    constraint: Constraint,
    shapes: Shapes,
    experts: int,
) -> Values:
    """Coefficients of a granularity that are as near to a start as it can say.

    The same granularity with the same options takes learned coefficients as they are. Otherwise
    each coefficient is the mean of the start over all parameters that it is for, where both
    granularities go along the axes of a parameter (from `task` to `row`, `column` and `head`). To
    and from others (`chunk`, `partition`, `singular`) it goes through the mean of each tensor.
    Whatever is not in the constraint's range is then moved into it.

    Args:
        start: Where to start.
        granularity: Which parameters share a coefficient.
        chosen: Its name and options.
        constraint: Which values coefficients may take.
        shapes: Of the parameters, `(L, *shape)` where stacked.
        experts: K.
    """
    entries = {name: _entries(start, name, shape, experts) for name, shape in shapes.items()}
    collect = _sums_over_parameters if granularity.along_axes(shapes) else _sums_over_tensors
    values = {
        group: jnp.where(share > 0, sums / jnp.where(share > 0, share, 1), start.initial)
        for group, (sums, share) in collect(granularity, entries, shapes, experts).items()
    }
    if start.learned is not None and _is_same(start.learned, chosen):
        values = {
            group: _as_learned(group, array, start.learned, start.initial)
            for group, array in values.items()
        }
    return {group: constraint.apply(constraint.invert(array)) for group, array in values.items()}


def _entries(
    start: WarmStart, name: str, shape: tuple[int, ...], experts: int
) -> Float[np.ndarray, "..."]:
    """What a start says of one parameter: `[K, ...]`, or `[L, K, ...]`, that broadcasts to it.

    NaN where nothing is known.
    """
    own = tensor_shape(name, shape)
    scales = []
    for tensor in tensors_of(name, shape):
        scale = np.asarray(start.scales.get(tensor, np.full(experts, np.nan)), np.float32)
        scales.append(scale.reshape(experts, *(scale.shape[1:] or (1,) * len(own))))
    return np.stack(np.broadcast_arrays(*scales)) if is_stacked(name) else scales[0]


def _sums_over_parameters(
    granularity: Granularity,
    entries: Mapping[str, Float[np.ndarray, "..."]],
    shapes: Shapes,
    experts: int,
) -> dict[str, tuple[Array, Array]]:
    """Sums of entries over all parameters that share a coefficient, and how many are known.

    A scale is a linear function of the coefficients, one 1 in each of its rows. Its transpose
    therefore sums, over the entries of a scale that share a coefficient, what it is given: once
    what the entries are times the number of parameters they are for, once that number.
    """
    zero = granularity.init(constant(shapes, experts, 0.0))
    scales, transpose = jax.vjp(granularity.scales, zero)
    sums, counts = {}, {}
    for name, scale in scales.items():
        entry, own = entries[name], tensor_shape(name, shapes[name])
        of_scale = scale.shape[scale.ndim - len(own) :]
        shared = tuple(
            entry.ndim - len(own) + axis for axis, size in enumerate(of_scale) if size == 1
        )
        known = ~np.isnan(entry)
        count = np.float32(prod(own) / prod(of_scale))
        for found, values in ((sums, np.where(known, entry, 0)), (counts, known)):
            values = values.astype(np.float32)
            mean = values.mean(shared, keepdims=True) if shared else values
            found[name] = jnp.asarray(np.broadcast_to(mean, scale.shape) * count)
    (total,), (share,) = transpose(sums), transpose(counts)
    return {group: (total[group], share[group]) for group in total}


def _sums_over_tensors(
    granularity: Granularity,
    entries: Mapping[str, Float[np.ndarray, "..."]],
    shapes: Shapes,
    experts: int,
) -> dict[str, tuple[Array, Array]]:
    """As `_sums_over_parameters`, up to a factor, of whole tensors, which `init` averages."""
    means = {
        name: entry.reshape(-1, experts, prod(entry.shape[1 + is_stacked(name) :])).mean(-1)
        for name, entry in entries.items()
    }
    total = granularity.init({name: jnp.asarray(np.nan_to_num(own)) for name, own in means.items()})
    share = granularity.init(
        {name: jnp.asarray(~np.isnan(own), jnp.float32) for name, own in means.items()}
    )
    return {group: (total[group], share[group]) for group in total}


def _depths(coefficients: Coefficients) -> Mapping[str, int]:
    """The depths of the base's stacks; files of earlier versions only know what was mixed."""
    return coefficients.depths or stack_depths(coefficients.shapes)


def _as_learned(
    group: str, values: Float[Array, "G K ..."], learned: Coefficients, initial: float
) -> Float[Array, "G K ..."]:
    """The values of a group, those of its layers that were learned in their place."""
    layers = np.array(values)
    names = unstack(group, len(layers)) if is_stacked(group) else [group]
    for layer, name in zip(layers, names, strict=True):
        own = learned.values.get(name)
        if own is not None and own.shape == layer.shape:
            layer[...] = np.where(np.isnan(own), np.float32(initial), own)
    return jnp.asarray(layers)


def _rearranged(coefficients: Coefficients, experts: Sequence[str]) -> Coefficients:
    """The coefficients of these experts in this order; NaN for those that they do not know."""
    positions = dict(zip(coefficients.names, range(len(coefficients.names)), strict=True))
    values = {
        group: np.stack(
            [
                own[positions[name]] if name in positions else np.full_like(own[0], np.nan)
                for name in experts
            ]
        )
        for group, own in coefficients.values.items()
    }
    # From here on only the number of experts counts.
    known = dict(zip(coefficients.names, coefficients.experts, strict=True))
    sources = tuple(known.get(name, coefficients.base) for name in experts)
    return dataclasses.replace(coefficients, values=values, experts=sources)


def _along_axes(coefficients: Coefficients) -> dict[str, Float[np.ndarray, "K ..."]]:
    """The scale of each tensor where it broadcasts against it, else its mean `[K]`."""
    if coefficients.unstacked_granularity.along_axes(coefficients.shapes):
        return {name: np.asarray(scale) for name, scale in coefficients.scales().items()}
    return coefficients.per_tensor()


def _is_same(learned: Coefficients, chosen: GranularityChoice) -> bool:
    """Whether coefficients are of a granularity with just these options."""
    name, options = chosen
    return learned.granularity == name and same_options(learned.granularity_options, options)


def _notes_on_experts(
    coefficients: Coefficients, models: Models, known: list[str], initial: float, source: str
) -> list[str]:
    """What becomes of the experts of a file and of those of the recipe."""
    _, *experts = models.sources
    notes = [f"starting from {source}: {', '.join(known)} where they were learned"]
    if new := [expert for expert in experts if expert.name not in coefficients.names]:
        words = ", ".join(e.name + namesake(e, coefficients.experts) for e in new)
        notes[0] += f"; new, starting at {initial:g}: {words}"
    if gone := [name for name in coefficients.names if name not in known]:
        notes[0] += f"; no longer there: {', '.join(gone)}"
    changed = other_contents(coefficients.experts, experts)
    notes += [f"{source} was {words}: it keeps its coefficients" for words in changed.values()]
    return notes


def _other_interference(
    coefficients: Coefficients, interference: Sequence[FittedStep]
) -> list[str]:
    """Says that task vectors were changed in another way when coefficients were learned."""
    before, now = (
        [(step.name, dict(step.options)) for step in steps]
        for steps in (coefficients.interference, interference)
    )
    if before == now:
        return []
    words = [" and ".join(name for name, _ in steps) or "none" for steps in (before, now)]
    return [
        f"they were learned after other interference steps or options ({words[0]}; now "
        f"{words[1]}), and may be too large or too small for these task vectors"
    ]


def _how(start: WarmStart, chosen: GranularityChoice) -> str:
    """Says by which rule coefficients of one granularity become those of another."""
    name = chosen.name
    if start.learned is None:
        return f"{name} coefficients start at one number for each tensor and expert"
    if _is_same(start.learned, chosen):
        return f"{name} coefficients start as they were learned"
    before, shapes = start.learned.granularity, start.learned.shapes
    place = "tensor"
    if start.learned.unstacked_granularity.along_axes(shapes):
        # What does not fit all tensors of the file may fit those that are merged now.
        with suppress(InputError):
            place = "place" if chosen.along_axes(shapes) else "tensor"
    return f"{name} coefficients start at the mean of the {before} coefficients of their {place}"


def _out_of_range(start: WarmStart, constraint: str) -> list[str]:
    """Says how much of a start the constraint does not allow."""
    rule = CONSTRAINTS[constraint]
    arrays = start.scales if start.learned is None else start.learned.values
    moved = total = 0
    for array in arrays.values():
        values = np.where(np.isnan(array), np.float32(start.initial), array)[None]
        allowed = np.asarray(rule.apply(rule.invert(jnp.asarray(values))))
        moved += int((np.abs(allowed - values) > _MOVED).sum())
        total += values.size
    if not moved:
        return []
    return [
        f"{moved:,} of {total:,} coefficients are not {rule.range}, as the constraint "
        f"{constraint!r} asks; they start at what it allows"
    ]
