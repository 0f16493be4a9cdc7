"""The cost of a recipe: sizes, memory, time, disk, and changes that make it fit."""

from collections.abc import Callable, Mapping
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from adamerge_jax.coefficients.granularities import count_units
from adamerge_jax.data.copies import copies_within
from adamerge_jax.evaluation.retention import RETAINED
from adamerge_jax.methods import make_method
from adamerge_jax.pipeline.export import export_bytes
from adamerge_jax.pipeline.heads import MOST_TO_FIT
from adamerge_jax.plan.advice import Change, Target, advise
from adamerge_jax.plan.hardware import (
    DEVICES,
    Device,
    find_device,
    host_memory,
    resident_bytes,
)
from adamerge_jax.plan.memory import Memory, Programs, memory_of, programs_of
from adamerge_jax.plan.mixing_time import Mixing
from adamerge_jax.plan.outline import Outline, outline
from adamerge_jax.plan.work import Work
from adamerge_jax.recipes.schema import Recipe
from adamerge_jax.registry import choice_in_words


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
        first_merge: The time of the models on the calibration data, of which a method makes the
            merge that learning starts from.
        results: The time of all models of the table of results on the test data, of task
            arithmetic on the validation data, and of the heads that are fitted to them.
    """

    step: float
    expert_targets: float
    steps: float
    held_out_evaluations: float
    head_fits: float
    first_merge: float
    results: float

    @property
    def total(self) -> float:
        """The sum of these; `Plan.notes` name what is not in it."""
        return sum(self) - self.step


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
        return Target(self.device, self.memory.floor).peak(self.memory)

    @property
    def fits(self) -> bool:
        """True if the peak is within the device's memory."""
        return self.peak <= self.device.memory


_TRIED_INITIAL = 4
"""The values among which `initial: auto` chooses, as a rule."""

_HEAD_FIT_EVALUATIONS = 400
"""The evaluations of the objective of a head's fit with those of its cross-validation: 250 to 480
for three unlike heads."""


_STATISTICS = 3
"""The forward passes that take as long as one from which a method learns of a layer's inputs."""


def make_plan(
    recipe: Recipe,
    root: Path,
    device: str | None = None,
    report: Callable[[str], Any] = lambda line: None,
) -> Plan:
    """Predicts the cost of a recipe's run; reads no weight.

    Args:
        recipe: The recipe.
        root: Folder that its relative paths start from.
        device: A key of `DEVICES`, `cpu`, or None for the present device, for which the step is
            compiled: the sizes of activations are then the compiler's.
        report: Shows what is looked at.

    Raises:
        InputError: A checkpoint, a file or the device cannot be used.
    """
    report("measuring the device")
    chosen = find_device(device)
    report("opening checkpoints and data")
    merge = outline(recipe, root)
    floor = resident_bytes()
    present = jax.devices()[0].platform
    compiled = device is None or (device == "cpu" and present == "cpu")
    report("compiling the step" if compiled else "tracing the step")
    learning = merge.learning()
    programs = programs_of(merge, learning, compiled=compiled, is_cpu=chosen.is_cpu)
    target = Target(chosen, floor)
    if not chosen.is_cpu:
        split = recipe.devices.model
        devices = split if device in DEVICES else jax.device_count()
        target = Target(chosen, floor, devices, split)
    memory = memory_of(
        merge, learning, programs, floor=floor, devices=target.devices, split=target.split
    )
    parameters = sum(int(np.prod(leaf.shape)) for leaf in merge.base.values())
    shapes = merge.shapes
    fits = target.peak(memory) <= chosen.memory
    return Plan(
        parameters,
        sum(int(np.prod(shape)) for shape in shapes.values()),
        count_units(learning.granularity, learning.values, shapes),
        chosen,
        programs,
        memory,
        host_memory(),
        _seconds(merge, programs, chosen, target.devices),
        export_bytes(merge.models, recipe.export),
        [] if fits else advise(merge, target, programs, report),
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
        needs_data = make_method(chosen.name, chosen.options).needs_data
        of_merge = "the equations of the merge" if needs_data else "the merge"
        parts.append(f"{of_merge} by {in_words} that learning starts from (initial_merge)")
    if merge.recipe.interference:
        parts.append("interference steps")
    if merge.method.copies:
        parts.append("changing copies of examples")
    if merge.method.heads.fit is not None and not device.is_cpu:
        parts.append("fitting heads on the host, beside the features that they are fitted to")
    general = merge.data["calibration"].get(RETAINED)
    if general is not None:
        parts.append("the base's writing of answers to general text that has none")
    if merge.data["test"] and merge.models.family.language:
        parts.append("the writing of answers for the table of results")
    if merge.data["test"] and merge.recipe.evaluation.methods:
        parts.append("merges by evaluation.methods, beside their evaluation")
    return f"not in the total time: {'; '.join(parts)}"


def _seconds(merge: Outline, programs: Programs, device: Device, devices: int) -> Seconds:
    recipe = merge.recipe
    dtype = np.dtype(next(iter(merge.base.values())).dtype).name
    attained = device.attainable * devices
    rate = device.flops.get(dtype, device.flops["float32"]) * attained
    bandwidth = device.bandwidth * attained

    def seconds(work: Work) -> float:
        return max(work.flops / rate, work.moved_bytes / bandwidth)

    share = merge.average_length / merge.longest if merge.longest else 1.0
    share_of_batch = share if merge.packing is None else 1.0
    calibration, method = merge.data["calibration"], merge.method
    counts = {task: len(size) for task, size in calibration.items()}
    with_copies = {t: count * (1 + method.copies_of(count)) for t, count in counts.items()}
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
    mixing = Mixing.of(merge)
    step = share_of_batch * seconds(programs.step) + mixing.seconds(device, devices)
    # Without a backward pass task vectors are read once.
    evaluate = mixing._replace(parts=1, once=False, recomputed=False).seconds(device, devices) / 2
    evaluate += share_of_batch * seconds(programs.evaluate)
    batches = ceil(held_out / recipe.learning.batch_size)
    example = share * seconds(programs.expert) / programs.expert_examples
    head_fits = 0.0
    fitted = {} if method.heads.fit is None else _fitted_examples(merge)
    if fitted:
        head_fits = example * sum(fitted.values())
        if device.is_cpu:
            # In float64.
            head_fits += 2 * _head_fit_flops(merge, fitted) / device.flops["float32"]
    return Seconds(
        step,
        example * expert_examples,
        step * sum(stages),
        evaluate * batches * evaluations,
        head_fits,
        _first_merge_examples(merge) * example,
        _result_examples(merge, sum(fitted.values())) * example,
    )


def _fitted_examples(merge: Outline) -> dict[str, int]:
    """Returns the examples with their copies that each task's head is fitted to."""
    counts = {task: len(size) for task, size in merge.data["calibration"].items()}
    return {
        task: count * (1 + copies_within(MOST_TO_FIT, count, merge.method.copies_of(count)))
        for task, count in counts.items()
    }


def _first_merge_examples(merge: Outline) -> int:
    """Returns the examples that a method is run on for the merge that learning starts from."""
    chosen = merge.recipe.coefficients.initial_merge
    if chosen is None or not make_method(chosen.name, chosen.options).needs_data:
        return 0
    return _STATISTICS * sum(map(len, merge.data["calibration"].values()))


def _result_examples(merge: Outline, fitted: int) -> int:
    """Returns the examples that models are run on for the table of results.

    Args:
        merge: The merge.
        fitted: The number of examples that heads are fitted to.
    """
    evaluation, tested = merge.recipe.evaluation, sum(map(len, merge.data["test"].values()))
    if not tested:
        return 0
    # Task arithmetic; and with all of them the base and the average.
    single = {"none": 0, "quick": 1, "all": 3}[evaluation.baselines] + len(evaluation.methods)
    validated = 0
    if evaluation.baselines != "none":
        single += merge.recipe.coefficients.initial_merge is not None
        tried = min(len(evaluation.task_arithmetic), ceil(len(evaluation.task_arithmetic) / 3) + 2)
        validated = tried * sum(map(len, merge.data["validation"].values()))
    experts_and_merge = 1 + (evaluation.baselines != "none")
    return single * (tested + fitted) + experts_and_merge * tested + validated


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
