"""The cost of a recipe: sizes, memory, time, disk, and changes that make it fit."""

from collections.abc import Iterator, Mapping
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from adamerge_jax.coefficients.granularities import count_units
from adamerge_jax.data.batches import BATCHES_SORTED_TOGETHER
from adamerge_jax.errors import InputError
from adamerge_jax.pipeline.export import export_bytes
from adamerge_jax.pipeline.general import RETAINED
from adamerge_jax.plan.hardware import (
    DEVICES,
    Device,
    find_device,
    host_memory,
    resident_bytes,
)
from adamerge_jax.plan.memory import Memory, Programs, memory_of, programs_of
from adamerge_jax.plan.outline import Outline, outline
from adamerge_jax.plan.work import Work
from adamerge_jax.recipes.schema import Recipe
from adamerge_jax.registry import choice_in_words


class Change(NamedTuple):
    """An advised change of a recipe, made after those before it.

    Attributes:
        field: The field of the recipe.
        value: The new value of the field.
        peak: The predicted peak in bytes, with all changes up to this one.
        fits: True if this peak is within the device's memory.
    """

    field: str
    value: Any
    peak: int
    fits: bool


class Seconds(NamedTuple):
    """The predicted times, in seconds.

    Attributes:
        step: The time of one step on a batch of the average length.
        expert_targets: The time of all experts on their calibration examples.
        steps: The time of all steps.
        held_out_evaluations: The time of all evaluations of the held-out data, with those that
            choose the initial coefficient.
        head_fits: The time of the merged model on all examples that heads are fitted to and, where
            the device is the CPU, of the fits.
    """

    step: float
    expert_targets: float
    steps: float
    held_out_evaluations: float
    head_fits: float

    @property
    def total(self) -> float:
        """The sum of these; `Plan.notes` name what is not in it."""
        return self.expert_targets + self.steps + self.held_out_evaluations + self.head_fits


class Plan(NamedTuple):
    """The predicted cost of a run.

    Attributes:
        parameters: The number of the model's parameters.
        merged: The number of parameters that are merged.
        coefficients: The number of coefficients and their units, in words.
        device: The device of the run.
        programs: The work of the compiled functions.
        memory: The memory by parts and phases.
        host_limit: The free memory of this machine, in bytes.
        seconds: The times.
        disk: The bytes that the export takes.
        changes: The advised changes; empty if the run fits.
        compiled: True if the sizes of activations are the compiler's.
        notes: The assumptions, a sentence each.
    """

    parameters: int
    merged: int
    coefficients: str
    device: Device
    programs: Programs
    memory: Memory
    host_limit: int
    seconds: Seconds
    disk: int
    changes: list[Change]
    compiled: bool
    notes: list[str]

    @property
    def peak(self) -> int:
        """The peak memory in bytes of the device, or of the process if the device is the CPU."""
        return _peak(self.memory, self.device)

    @property
    def fits(self) -> bool:
        """True if the peak is within the device's memory."""
        return self.peak <= self.device.memory


_TRIED_INITIAL = 4
"""The values among which `initial: auto` chooses, as a rule."""

_HEAD_FIT_EVALUATIONS = 400
"""The evaluations of the objective of a head's fit with those of its cross-validation: 250 to 480
for three unlike heads."""


class _Spread(NamedTuple):
    """The numbers of devices among which examples and parameters are split."""

    devices: int = 1
    split: int = 1


def make_plan(recipe: Recipe, root: Path, device: str | None = None) -> Plan:
    """Predicts the cost of a recipe's run; reads no weight.

    Args:
        recipe: The recipe.
        root: Folder that its relative paths start from.
        device: A key of `DEVICES`, `cpu`, or None for the present device, for which the step is
            compiled: the sizes of activations are then the compiler's.

    Raises:
        InputError: A checkpoint, a file or the device cannot be used.
    """
    chosen = find_device(device)
    merge = outline(recipe, root)
    floor = resident_bytes()
    present = jax.devices()[0].platform
    compiled = device is None or (device == "cpu" and present == "cpu")
    learning = merge.learning()
    programs = programs_of(merge, learning, compiled=compiled, is_cpu=chosen.is_cpu)
    spread = _Spread()
    if not chosen.is_cpu:
        split = recipe.devices.model
        spread = _Spread(split if device in DEVICES else jax.device_count(), split)
    memory = memory_of(merge, learning, programs, floor=floor, **spread._asdict())
    parameters = sum(int(np.prod(leaf.shape)) for leaf in merge.base.values())
    shapes = merge.shapes
    fits = _peak(memory, chosen) <= chosen.memory
    return Plan(
        parameters,
        sum(int(np.prod(shape)) for shape in shapes.values()),
        count_units(learning.granularity, learning.values, shapes),
        chosen,
        programs,
        memory,
        host_memory(),
        _seconds(merge, programs, chosen, spread),
        export_bytes(merge.models, recipe.export),
        [] if fits else list(_changes(merge, chosen, floor, spread)),
        compiled,
        [
            *(
                f"{part} data of {task}: {size.assumed}"
                for part, sizes in merge.data.items()
                for task, size in sizes.items()
                if size.assumed
            ),
            _not_counted(merge, chosen),
        ],
    )


def _not_counted(merge: Outline, device: Device) -> str:
    """Returns the note that names what is not in the total time."""
    parts = ["opening, reading and writing files", "compiling"]
    if (chosen := merge.recipe.coefficients.initial_merge) is not None:
        in_words = choice_in_words(chosen.name, chosen.options)
        parts.append(f"the merge by {in_words} that learning starts from (initial_merge)")
    if merge.recipe.interference:
        parts.append("interference steps")
    if merge.method.copies:
        parts.append("changing copies of examples")
    if merge.method.heads.fit is not None and not device.is_cpu:
        parts.append("fitting heads on the host, beside the features that they are fitted to")
    general = merge.data["calibration"].get(RETAINED)
    if general is not None:
        parts.append("the base's writing of answers to general text that has none")
    if merge.data["test"]:
        parts.append("the table of results")
    return f"not in the total time: {'; '.join(parts)}"


def _peak(memory: Memory, device: Device) -> int:
    return memory.host_peak(shared=True)[1] if device.is_cpu else memory.device_peak().device


def _seconds(merge: Outline, programs: Programs, device: Device, spread: _Spread) -> Seconds:
    recipe = merge.recipe
    dtype = np.dtype(next(iter(merge.base.values())).dtype).name
    attained = device.attainable * spread.devices
    rate = device.flops.get(dtype, device.flops["float32"]) * attained
    bandwidth = device.bandwidth * attained

    def seconds(work: Work) -> float:
        return max(work.flops / rate, work.moved_bytes / bandwidth)

    share = _average_length(merge) / merge.longest if merge.longest else 1.0
    calibration, method = merge.data["calibration"], merge.method
    with_copies = {task: (1 + method.copies) * len(size) for task, size in calibration.items()}
    expert_examples = sum(
        count if task == other else min(merge.target_specs[task].cross_task, count)
        for task in calibration
        for other, count in with_copies.items()
        if merge.target_specs[task].expert
    )
    coarse = recipe.coefficients.coarse
    stages = [recipe.learning.steps, *([coarse.steps] if coarse else [])]
    evaluations = sum(
        1 + ceil(steps / (recipe.learning.evaluate_every or max(1, steps // 10)))
        for steps in stages
    )
    evaluations += _TRIED_INITIAL * method.chooses_initial
    held_out = max(max(1, round(recipe.learning.held_out * len(s))) for s in calibration.values())
    step = share * seconds(programs.step)
    batches = ceil(held_out / recipe.learning.batch_size)
    example = share * seconds(programs.expert) / programs.expert_examples
    head_fits = 0.0
    if method.heads.fit is not None:
        head_fits = example * sum(with_copies.values())
        if device.is_cpu:
            # In float64.
            head_fits += 2 * _head_fit_flops(merge, with_copies) / device.flops["float32"]
    return Seconds(
        step,
        example * expert_examples,
        step * sum(stages),
        share * seconds(programs.evaluate) * batches * evaluations,
        head_fits,
    )


def _head_fit_flops(merge: Outline, examples: Mapping[str, int]) -> float:
    """Returns the operations of fitting heads: products of features and weights, both ways."""
    if merge.method.heads.fit == "scaled":
        return 0.0
    flops = 0.0
    for task, parameters in merge.head_parameters.items():
        last = merge.models.head_form(task).last_layer
        if last is not None:
            weights = int(np.prod(parameters[last.weight].shape))
            flops += _HEAD_FIT_EVALUATIONS * 4.0 * examples[task] * weights
    return flops


def _average_length(merge: Outline) -> float:
    """Returns the mean length of batches, each padded to the longest of its similar examples."""
    quantiles = (np.arange(BATCHES_SORTED_TOGETHER) + 1) / BATCHES_SORTED_TOGETHER
    sizes = merge.data["calibration"].values()
    longest = [np.quantile(size.lengths, quantiles, method="higher") for size in sizes]
    return float(np.max(longest, axis=0).mean())


def _changes(merge: Outline, device: Device, floor: int, spread: _Spread) -> Iterator[Change]:
    """Yields changes that lower the peak, the cheapest first, until the run fits.

    Their peaks come from the traces of the changed programs, which are not compiled.
    """

    def peak_of(changed: Outline) -> int:
        learning = changed.learning()
        programs = programs_of(changed, learning, compiled=False, is_cpu=device.is_cpu)
        memory = memory_of(changed, learning, programs, floor=floor, **spread._asdict())
        return _peak(memory, device)

    before = peak_of(merge)
    useless = set()
    for field, value in _candidates(merge):
        if field in useless:
            continue
        try:
            changed = merge.changed(field, value)
        except InputError:
            # The other fields of the recipe do not go with it.
            useless.add(field)
            continue
        peak = peak_of(changed)
        # A change that hardly helps is not advised, nor are further values of its field.
        if peak > 0.98 * before:
            useless.add(field)
            continue
        merge, before = changed, peak
        yield Change(field, value, peak, peak <= device.memory)
        if peak <= device.memory:
            return


def _candidates(merge: Outline) -> Iterator[tuple[str, Any]]:
    """Yields fields and values that take less memory, the cheapest first."""
    recipe = merge.recipe
    # The cost is a little time: more is computed twice.
    if recipe.learning.rematerialize != "layer":
        yield "learning.rematerialize", "layer"
    # The cost is smaller matrix products.
    batch_size = recipe.learning.batch_size
    for parts in range(recipe.learning.microbatches + 1, batch_size + 1):
        if batch_size % parts == 0:
            yield "learning.microbatches", parts
    yield from (("evaluation.batch_size", size) for size in _halves(recipe.evaluation.batch_size))
    # The cost is precision.
    if recipe.task_vectors.dtype is None:
        yield "task_vectors.dtype", "bfloat16"
    if recipe.dtype is None or recipe.dtype == "float32":
        yield "dtype", "bfloat16"
    if recipe.task_vectors.dtype not in ("int8", "int4"):
        yield "task_vectors.dtype", "int8"
    if recipe.task_vectors.dtype != "int4" and recipe.task_vectors.memory == "device":
        yield "task_vectors.dtype", "int4"
    # The cost is time: task vectors are moved in every step.
    if recipe.task_vectors.memory == "device" and recipe.devices.model == 1:
        yield "task_vectors.memory", "host"
    if recipe.task_vectors.memory != "disk" and recipe.devices.model == 1:
        yield "task_vectors.memory", "disk"
    # The cost is noisier gradients.
    yield from (("learning.batch_size", size) for size in _halves(batch_size))
    # The cost is the end of long texts.
    yield from (("max_length", length) for length in _halves(recipe.max_length) if length >= 32)


def _halves(size: int) -> list[int]:
    return [size >> shift for shift in range(1, size.bit_length())]
