"""Starts learning at the coefficients of an earlier run or at the weights of a mergekit file.

A `WarmStart` gives each tensor its coefficients; `initial_values` converts it to coefficients of
any granularity. Another source of a start is one function that returns a `WarmStart`.
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
from adamerge_jax.errors import InputError, in_hand, shorten
from adamerge_jax.interference import FittedStep
from adamerge_jax.parameter_names import is_stacked, stack_depths, tensor_shape, tensors_of, unstack
from adamerge_jax.pipeline.models import Models
from adamerge_jax.recipes.build import GranularityChoice, Method
from adamerge_jax.registry import choice_in_words

_ROUNDING = 1e-4
"""The largest difference between a coefficient and its constrained value that is rounding."""


class WarmStart(NamedTuple):
    """The coefficients that learning starts from.

    Attributes:
        scales: The coefficients by tensor name without `*`: `[K, ...]` that broadcasts against
            `[K, *shape]`, or `[K]`. The experts are in the order of the recipe; NaN for experts
            without a start value. Tensors without start values are left out.
        initial: The value at which all other coefficients start.
        source: The origin of the start, for the coefficients file.
        notes: Notes for the user, a sentence each.
        learned: The learned coefficients of the recipe's experts, NaN where there are none; the
            same granularity takes them unchanged.
    """

    scales: Mapping[str, Float[np.ndarray, "K ..."]]
    initial: float
    source: str
    notes: tuple[str, ...] = ()
    learned: Coefficients | None = None


def open_warm_start(method: Method, models: Models, root: Path) -> WarmStart | None:
    """Reads the file that a method starts from; returns None if the method names none.

    Args:
        method: The method with the file, and the initial value of experts that are not in it.
        models: The base and its experts.
        root: Folder that relative paths start from.

    Raises:
        InputError: `start_from_file` or `start_from_mergekit` refuses the file, or its coefficients
            are added to another merge than the method's.
    """
    if method.start is None:
        return None
    file = root / Path(method.start).expanduser()
    if file.suffix in (".yaml", ".yml"):
        if method.initial_merge is not None:
            raise InputError(
                f"coefficients.start: {method.start} has the weights of a merge of the base, and "
                "coefficients.initial_merge takes its place; leave one of the two out"
            )
        start = start_from_mergekit(file, models, initial=method.initial, source=method.start)
    else:
        try:
            with in_hand(file):
                coefficients = Coefficients.load(file)
        except InputError as error:
            raise InputError(f"coefficients.start: {error}") from error
        _require_same_initial_merge(coefficients, method)
        start = start_from_file(
            coefficients,
            models,
            initial=method.initial,
            other_base=method.other_base,
            source=method.start,
        )
        interference_notes = _interference_notes(coefficients, method.interference)
        start = start._replace(notes=(*start.notes, *interference_notes))
    return start._replace(
        notes=(
            *start.notes,
            _granularity_note(start, method.stages[0].granularity),
            *_constraint_notes(start, method.constraint),
        )
    )


def start_from_mergekit(file: Path, models: Models, *, initial: float, source: str) -> WarmStart:
    """Returns a start at the weights of a mergekit file, one for each tensor and expert.

    Args:
        file: A file that `adamerge_jax.checkpoints.mergekit.read_weights` reads.
        models: The base and its experts, which the file names by the same paths or Hub names.
        initial: The initial value of tensors that are not in the file.
        source: The origin of the start, for the coefficients file.

    Raises:
        InputError: The file is no mergekit file, is of other models, or is no merge by
            coefficients.
    """
    try:
        with in_hand(file):
            weights = read_weights(file, models.base, models.experts)
    except InputError as error:
        raise InputError(f"coefficients.start: {error}") from error
    return WarmStart(weights, initial, source)


def start_from_file(
    coefficients: Coefficients, models: Models, *, initial: float, other_base: bool, source: str
) -> WarmStart:
    """Returns a start at learned coefficients, of which some may be for other experts.

    Experts are matched by name: an expert that was replaced by a newer fine-tune keeps its
    coefficients, one that is gone is ignored, and a new one starts at `initial`. For a base of
    another size, coefficients are averaged per tensor and carried over by `carry`.

    Args:
        coefficients: The learned coefficients.
        models: The base and its experts.
        initial: The initial value of coefficients that were not learned.
        other_base: If True, the coefficients may be those of another base.
        source: The file of the coefficients, for messages.

    Raises:
        InputError: No expert has coefficients, or the base is another one and `other_base` is
            False.
    """
    base, *experts = models.sources
    names = [expert.name for expert in experts]
    matched = [name for name in names if name in coefficients.names]
    if not matched:
        raise InputError(
            f"coefficients.start: {source} was learned for {', '.join(coefficients.names)}, the "
            f"recipe has {', '.join(names)}; experts are matched by name, and none has the same"
        )
    change = other_contents([coefficients.base], [base])
    depths, base_depths = _depths(coefficients), stack_depths(models.base.names)
    # A deeper base has all tensors of a shallower one, at other relative depths.
    same_size = all(
        name in models.base.names and models.base.shape(name) == shape
        for name, shape in coefficients.shapes.items()
    ) and (not change or all(base_depths.get(stack) == depth for stack, depth in depths.items()))
    notes = _expert_notes(coefficients, models, matched, initial, source)
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
        learned = _reorder_experts(coefficients, names)
        scales = _tensor_scales(learned)
    else:
        learned = None
        per_tensor = _reorder_experts(coefficients, names).per_tensor()
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
    """Returns the coefficients of a granularity that are nearest to a start.

    The same granularity with the same options takes learned coefficients unchanged. Otherwise each
    coefficient is the mean of the start over all parameters that share it, if both granularities go
    along the axes of a parameter (from `task` to `row`, `column` and `head`). For others (`chunk`,
    `partition`, `singular`) it is the mean of whole tensors. Values outside of the constraint's
    range are then moved into it.

    Args:
        start: The start.
        granularity: The granularity of the coefficients.
        chosen: The name and options of the granularity.
        constraint: The constraint on coefficients.
        shapes: The shapes of the parameters, `(L, *shape)` where stacked.
        experts: The number of experts, K.

    Returns:
        The coefficients by group, `[G, K, ...]`.
    """
    entries = {n: _parameter_scales(start, n, shape, experts) for n, shape in shapes.items()}
    collect = _sums_over_parameters if granularity.along_axes(shapes) else _sums_over_tensors
    values = {
        group: jnp.where(share > 0, sums / jnp.where(share > 0, share, 1), start.initial)
        for group, (sums, share) in collect(granularity, entries, shapes, experts).items()
    }
    if start.learned is not None and _has_granularity(start.learned, chosen):
        values = {
            group: _take_learned(group, array, start.learned, start.initial)
            for group, array in values.items()
        }
    return {group: constraint.apply(constraint.invert(array)) for group, array in values.items()}


def _parameter_scales(
    start: WarmStart, name: str, shape: tuple[int, ...], experts: int
) -> Float[np.ndarray, "..."]:
    """Returns the start values of one parameter, which broadcast to it; NaN where there are none.

    The shape is `[K, ...]`, or `[L, K, ...]` where stacked.
    """
    axes = len(tensor_shape(name, shape))
    scales = []
    for tensor in tensors_of(name, shape):
        scale = np.asarray(start.scales.get(tensor, np.full(experts, np.nan)), np.float32)
        scales.append(scale.reshape(experts, *(scale.shape[1:] or (1,) * axes)))
    return np.stack(np.broadcast_arrays(*scales)) if is_stacked(name) else scales[0]


def _sums_over_parameters(
    granularity: Granularity,
    entries: Mapping[str, Float[np.ndarray, "..."]],
    shapes: Shapes,
    experts: int,
) -> dict[str, tuple[Array, Array]]:
    """Sums the start values of all parameters that share a coefficient, and counts them.

    A scale is a linear function of the coefficients: a matrix with one 1 in each row. Its transpose
    therefore adds up what belongs to one coefficient: first the start values times the number of
    parameters that each stands for, then these numbers.

    Returns:
        The sum and the count by group, both `[G, K, ...]`; missing values are not counted.
    """
    zero = granularity.init(constant(shapes, experts, 0.0))
    scales, transpose = jax.vjp(granularity.scales, zero)
    sums: dict[str, Array] = {}
    counts: dict[str, Array] = {}
    for name, scale in scales.items():
        entry, shape = entries[name], tensor_shape(name, shapes[name])
        scale_shape = scale.shape[scale.ndim - len(shape) :]
        shared = tuple(
            entry.ndim - len(shape) + axis for axis, size in enumerate(scale_shape) if size == 1
        )
        is_given = ~np.isnan(entry)
        count = np.float32(prod(shape) / prod(scale_shape))
        for totals, values in ((sums, np.where(is_given, entry, 0)), (counts, is_given)):
            values = values.astype(np.float32)
            mean = values.mean(shared, keepdims=True) if shared else values
            totals[name] = jnp.asarray(np.broadcast_to(mean, scale.shape) * count)
    (total,), (share,) = transpose(sums), transpose(counts)
    return {group: (total[group], share[group]) for group in total}


def _sums_over_tensors(
    granularity: Granularity,
    entries: Mapping[str, Float[np.ndarray, "..."]],
    shapes: Shapes,
    experts: int,
) -> dict[str, tuple[Array, Array]]:
    """Does as `_sums_over_parameters`, up to a factor, for means of whole tensors."""
    means = {
        name: entry.reshape(-1, experts, prod(entry.shape[1 + is_stacked(name) :])).mean(-1)
        for name, entry in entries.items()
    }
    total = granularity.init({n: jnp.asarray(np.nan_to_num(mean)) for n, mean in means.items()})
    share = granularity.init(
        {n: jnp.asarray(~np.isnan(mean), jnp.float32) for n, mean in means.items()}
    )
    return {group: (total[group], share[group]) for group in total}


def _depths(coefficients: Coefficients) -> Mapping[str, int]:
    """Returns the depths of the base's stacks; older files have those of mixed tensors only."""
    return coefficients.depths or stack_depths(coefficients.shapes)


def _take_learned(
    group: str, values: Float[Array, "G K ..."], learned: Coefficients, initial: float
) -> Float[Array, "G K ..."]:
    """Returns the values of a group, with learned ones in the layers that have them."""
    layers = np.array(values)
    names = unstack(group, len(layers)) if is_stacked(group) else [group]
    for layer, name in zip(layers, names, strict=True):
        learned_layer = learned.values.get(name)
        if learned_layer is not None and learned_layer.shape == layer.shape:
            layer[...] = np.where(np.isnan(learned_layer), np.float32(initial), learned_layer)
    return jnp.asarray(layers)


def _reorder_experts(coefficients: Coefficients, experts: Sequence[str]) -> Coefficients:
    """Returns the coefficients of these experts in this order; NaN for experts without any."""
    positions = dict(zip(coefficients.names, range(len(coefficients.names)), strict=True))
    values = {
        group: np.stack(
            [
                array[positions[name]] if name in positions else np.full_like(array[0], np.nan)
                for name in experts
            ]
        )
        for group, array in coefficients.values.items()
    }
    # From here on only the number of experts counts.
    by_name = dict(zip(coefficients.names, coefficients.experts, strict=True))
    sources = tuple(by_name.get(name, coefficients.base) for name in experts)
    return dataclasses.replace(coefficients, values=values, experts=sources)


def _tensor_scales(coefficients: Coefficients) -> dict[str, Float[np.ndarray, "K ..."]]:
    """Returns the scale of each tensor if it broadcasts against the tensor, else its mean `[K]`."""
    if coefficients.unstacked_granularity.along_axes(coefficients.shapes):
        return {name: np.asarray(scale) for name, scale in coefficients.scales().items()}
    return coefficients.per_tensor()


def _has_granularity(learned: Coefficients, chosen: GranularityChoice) -> bool:
    """Returns True if coefficients are of this granularity with the same options."""
    name, options = chosen
    return learned.granularity == name and same_options(learned.granularity_options, options)


def _expert_notes(
    coefficients: Coefficients, models: Models, matched: list[str], initial: float, source: str
) -> list[str]:
    """Describes the matches between the experts of a file and those of the recipe."""
    _, *experts = models.sources
    notes = [f"starting from {source}: {', '.join(matched)} where they were learned"]
    if new := [expert for expert in experts if expert.name not in coefficients.names]:
        words = ", ".join(e.name + namesake(e, coefficients.experts) for e in new)
        notes[0] += f"; new, starting at {initial:g}: {words}"
    if gone := [name for name in coefficients.names if name not in matched]:
        notes[0] += f"; no longer there: {', '.join(gone)}"
    changed = other_contents(coefficients.experts, experts)
    notes += [f"{source} was {words}: it keeps its coefficients" for words in changed.values()]
    return notes


def _require_same_initial_merge(coefficients: Coefficients, method: Method) -> None:
    """Refuses coefficients that were added to another merge: they mean something else."""
    before, now = coefficients.initial_merge, method.initial_merge
    same = (before is None) == (now is None)
    if before is not None and now is not None:
        same = before.name == now.name and same_options(before.options, now.options)
    if same:
        return
    words = "the base" if before is None else f"the merge by {shorten(before.in_words)}"
    now_words = "the base" if now is None else choice_in_words(now.name, now.options)
    remedy = "leave coefficients.initial_merge out"
    if before is not None:
        remedy = f"set coefficients.initial_merge to {shorten(before.in_words)}"
    raise InputError(
        f"coefficients.start: the coefficients of {method.start} are for task vectors that are "
        f"added to {words}, the recipe adds them to {now_words}; {remedy}, or start anew"
    )


def _interference_notes(
    coefficients: Coefficients, interference: Sequence[FittedStep]
) -> list[str]:
    """Describes other interference steps with which the coefficients were learned, if any."""
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


def _granularity_note(start: WarmStart, chosen: GranularityChoice) -> str:
    """Describes the conversion from the start's granularity to the chosen one."""
    name = chosen.name
    if start.learned is None:
        return f"{name} coefficients start at one number for each tensor and expert"
    if _has_granularity(start.learned, chosen):
        return f"{name} coefficients start as they were learned"
    before, shapes = start.learned.granularity, start.learned.shapes
    place = "tensor"
    if start.learned.unstacked_granularity.along_axes(shapes):
        # A granularity that refuses a tensor of the file may fit those that are merged now.
        with suppress(InputError):
            place = "place" if chosen.along_axes(shapes) else "tensor"
    return f"{name} coefficients start at the mean of the {before} coefficients of their {place}"


def _constraint_notes(start: WarmStart, constraint: str) -> list[str]:
    """Describes the part of a start that the constraint does not allow, if any."""
    rule = CONSTRAINTS[constraint]
    arrays = start.scales if start.learned is None else start.learned.values
    moved = total = 0
    for array in arrays.values():
        values = np.where(np.isnan(array), np.float32(start.initial), array)[None]
        allowed = np.asarray(rule.apply(rule.invert(jnp.asarray(values))))
        moved += int((np.abs(allowed - values) > _ROUNDING).sum())
        total += values.size
    if not moved:
        return []
    return [
        f"{moved:,} of {total:,} coefficients are not {rule.range}, as the constraint "
        f"{constraint!r} asks; they start at what it allows"
    ]
