"""The arrays that live in each phase of a run, on the device and on the host."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from adamerge_jax.checkpoints.matching import MatchedCheckpoint
from adamerge_jax.data.batches import Batch
from adamerge_jax.data.expert_targets import MEMORY_BYTES, expert_targets, has_positions
from adamerge_jax.evaluation.evaluator import examples_at_once
from adamerge_jax.learning.learner import Frozen, State
from adamerge_jax.learning.microbatches import split
from adamerge_jax.methods import make_method
from adamerge_jax.methods.least_squares import GRAM_BYTES
from adamerge_jax.mixing import is_summed_once
from adamerge_jax.models.family import complete_head
from adamerge_jax.pipeline.export import checkpoint_bytes
from adamerge_jax.plan.outline import AbstractLearning, Outline, streamed_bytes
from adamerge_jax.plan.work import Work, bytes_of, work_of

RUNTIME_BYTES = 400_000_000
"""The bytes of compiled programs, and those that the C library's allocator does not give back: the
excess of measured runs on a CPU over their arrays."""


class Programs(NamedTuple):
    """The work of the compiled functions of a run, at the longest example.

    Attributes:
        step: The work of one optimizer step.
        evaluate: The work of a held-out evaluation of the same batch, without a gradient.
        expert: The work of an expert, or any one model, on the examples that are run at a time.
        expert_examples: Their number.
    """

    step: Work
    evaluate: Work
    expert: Work
    expert_examples: int


class Phase(NamedTuple):
    """A part of a run, and its peak.

    Attributes:
        name: The name in the table.
        device: The bytes in the device's memory.
        host: The bytes in the host's memory, without `device` if the device is the host.
    """

    name: str
    device: int
    host: int


class Memory(NamedTuple):
    """The memory that a run takes.

    Attributes:
        parts: The bytes by their purpose.
        phases: The phases of the run, in their order.
        floor: The bytes of the process without any array: Python, libraries, compiled programs.
    """

    parts: dict[str, int]
    phases: list[Phase]
    floor: int

    def device_peak(self) -> Phase:
        """Returns the phase with the largest memory on the device."""
        return max(self.phases, key=lambda phase: phase.device)

    def host_peak(self, shared: bool) -> tuple[str, int]:
        """Returns the name of the phase with the largest memory on the host, and its bytes.

        Args:
            shared: True if the device's memory is the host's.
        """
        totals = {phase.name: phase.host + shared * phase.device for phase in self.phases}
        name = max(totals, key=totals.get)
        return name, self.floor + totals[name]


def programs_of(
    outline: Outline,
    learning: AbstractLearning,
    *,
    compiled: bool,
    is_cpu: bool,
    names: Sequence[str] = ("step", "evaluate", "expert"),
) -> Programs:
    """Returns the work of the functions that a run compiles.

    Args:
        outline: The merge.
        learning: Its learning loop.
        compiled: If True, they are compiled for the present device, and the kept bytes are the
            compiler's; otherwise these are estimated from their traces.
        is_cpu: True for a run on the processor.
        names: The programs that are wanted; others take nothing.
    """
    batch = outline.batch(outline.longest)
    step = (learning.learner.step, learning.state, learning.frozen, batch)
    evaluate = (learning.learner.evaluate, learning.state, learning.frozen, batch)
    # The largest head; a language model has one for all tasks.
    task = max(outline.heads, key=lambda name: bytes_of(outline.head_parameters[name]))
    size = examples_at_once(outline.recipe.evaluation.batch_size, is_cpu=is_cpu)
    expert = (
        jax.jit(partial(_run_expert, outline, task)),
        outline.expert(task),
        outline.head_parameters[task],
        outline.inputs(size, outline.longest),
    )
    calls = {"step": step, "evaluate": evaluate, "expert": expert}
    works = dict.fromkeys(calls, Work(0.0, 0.0, 0))
    for name in names:
        works[name] = _step_work(outline, *step) if name == "step" else work_of(*calls[name])
        if compiled:
            works[name] = works[name]._replace(kept_bytes=_compiled_bytes(*calls[name]))
    return Programs(works["step"], works["evaluate"], works["expert"], size)


def _step_work(
    outline: Outline, step: Callable[..., Any], state: State, frozen: Frozen, batch: Batch
) -> Work:
    """Returns the work of a step, from the trace of one of its microbatches.

    The parts are alike. A trace of all takes longer, and cannot tell that the sum of their
    gradients grows in place.
    """
    parts = outline.method.microbatches
    if parts == 1:
        return work_of(step, state, frozen, batch)
    step_of_part = outline.changed("learning.microbatches", 1).learning().learner.step
    part = jax.eval_shape(lambda batch: jax.tree.map(lambda a: a[0], split(batch, parts)), batch)
    work = work_of(step_of_part, state, frozen, part)
    sums = bytes_of((state.raw, state.heads))
    kept = work.kept_bytes + sums + mixed_once_bytes(outline)
    return Work(parts * work.flops, parts * work.moved_bytes, kept)


def _run_expert(
    outline: Outline, task: str, parameters: Any, head_parameters: Any, inputs: Any
) -> Any:
    """Computes the targets that an expert gives for a batch."""
    spec = outline.target_specs[task]
    outputs = outline.backbone(parameters, inputs, hidden_states=bool(spec.hidden_states))
    head = outline.heads[task]
    logits = head(complete_head(head, head_parameters, parameters), outputs)
    states = {layer: outputs.hidden_states[layer] for layer in spec.hidden_states}
    # Logits are computed even if the targets have only some of them.
    return expert_targets(spec, logits, states)._replace(expert_logits=logits)


def _compiled_bytes(function: Any, *arguments: Any) -> int:
    """Returns the bytes of a compiled function beside its arguments, by the compiler's analysis."""
    analysis = function.lower(*arguments).compile().memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def memory_of(
    outline: Outline,
    learning: AbstractLearning,
    programs: Programs,
    *,
    floor: int,
    devices: int = 1,
    split: int = 1,
) -> Memory:
    """Returns the memory of a run by parts and by phases.

    Args:
        outline: The merge.
        learning: Its learning loop.
        programs: The work of its compiled functions.
        floor: The bytes of the process without any array or compiled program.
        devices: The number of devices among which examples are split; peaks are those of one.
        split: The number of devices among which parameters and task vectors are split.
    """
    base, deltas = bytes_of(outline.base), bytes_of(outline.deltas)
    # Task vectors that a granularity lays out anew exist in both layouts.
    copied = sum(
        bytes_of(delta)
        for name, delta in learning.frozen.deltas.items()
        if delta is not outline.deltas[name]
    )
    heads = bytes_of(outline.head_parameters)
    batch = bytes_of(outline.batch(outline.longest))
    # The new state is in the step's outputs; the best coefficients are on the host.
    state, coefficients = bytes_of(learning.state), bytes_of(learning.values)
    uses_experts = any(spec.expert for spec in outline.target_specs.values())
    expert = max(_expert_bytes(outline, task) for task in outline.heads)
    targets = targets_bytes(outline)
    data = sum(size.stored_bytes for part in outline.data.values() for size in part.values())
    largest = max(4 * int(np.prod(info.shape)) for info in _tensors(outline))
    merged = checkpoint_bytes(outline.models, outline.recipe.export)

    place = {"device": "", "host": " (host)", "disk": " (disk)"}[outline.recipe.task_vectors.memory]
    parts = {
        "base": base,
        f"task vectors of {outline.experts} experts{place}": deltas + copied,
        "task heads": heads,
        "coefficients": coefficients,
        "their gradient": coefficients,
        "optimizer state": bytes_of(learning.state.optimizer),
        "batch": batch,
        "activations of a step": max(0, programs.step.kept_bytes - mixed_once_bytes(outline)),
        "logits of one task in it": logits_bytes(outline),
    }
    if outline.method.mixes_once:
        parts["merged model and its gradient"] = mixed_once_bytes(outline)
    if uses_experts:
        parts |= {
            "one expert while it is asked": expert,
            "its activations": programs.expert.kept_bytes,
            "expert targets (host)": targets,
        }
    streamed = 0
    if outline.recipe.task_vectors.memory != "device":
        streamed = sum(map(streamed_bytes, outline.deltas.values()))
    beside = streamed if outline.recipe.task_vectors.memory == "host" else 0
    start = initial_merge_bytes(outline)
    if chosen := outline.recipe.coefficients.initial_merge:
        parts[f"merge by {chosen.name} that learning starts from"] = start
    held = (base + start + deltas + copied - streamed) // split
    step_kept = max(programs.step.kept_bytes, programs.evaluate.kept_bytes) // devices
    if split > 1:
        step_kept += 2 * largest  # a weight that is gathered, and its gradient
    expert_kept = programs.expert.kept_bytes // devices
    expert //= split
    # Interference steps read all task vectors together.
    while_reading = streamed if outline.recipe.interference else beside
    phases = [Phase("reading task vectors", held, data + while_reading + 3 * largest)]
    first = make_method(chosen.name, chosen.options) if chosen else None
    if first is not None and first.needs_data:
        # Beside the base and the task vectors, which are then read again.
        making = held + expert_kept + GRAM_BYTES // split
        phases.insert(0, Phase("making the first merge", making, data + beside + 3 * largest))
    if first is not None and first.interference:
        # Its steps are fitted to all task vectors, before those that learning needs are read.
        entries = outline.experts * start
        phases.insert(0, Phase("fitting the first merge", 0, data + entries + 3 * largest))
    if uses_experts:
        running = held + heads + expert + expert_kept
        phases.append(Phase("asking the experts", running, data + beside + targets))
    step = held + heads + state + batch // devices + step_kept
    phases.append(Phase("learning", step, data + beside + targets + coefficients))
    if outline.data["test"]:
        evaluating = held + heads + base // split + expert_kept
        phases.append(Phase("evaluating", evaluating, data + beside + targets))
    shard = min(merged, outline.recipe.export.shard_megabytes * 10**6)
    phases.append(Phase("exporting", held, data + beside + targets + shard + 3 * largest))
    return Memory(parts, phases, floor + RUNTIME_BYTES)


def mixed_once_bytes(outline: Outline) -> int:
    """Returns the bytes of the merged weights that microbatches share, and of their gradient.

    The gradient is there twice: that of one part, and the sum over the parts in float32. 0 where
    every part mixes.
    """
    if not outline.method.mixes_once:
        return 0
    summed = [outline.base[name] for name, d in outline.deltas.items() if is_summed_once(d)]
    return 2 * bytes_of(summed) + 4 * sum(int(np.prod(leaf.shape)) for leaf in summed)


def initial_merge_bytes(outline: Outline) -> int:
    """Returns the bytes of the merge that learning starts from beside the base; 0 without one."""
    if outline.recipe.coefficients.initial_merge is None:
        return 0
    return sum(bytes_of(outline.base[name]) for name in outline.deltas)


def _expert_bytes(outline: Outline, task: str) -> int:
    """Returns the bytes of one expert beside the base: for an adapter those of its factors."""
    is_whole = isinstance(outline.models.experts[task], MatchedCheckpoint)
    return bytes_of(outline.expert(task)) - (0 if is_whole else bytes_of(outline.base))


def _tensors(outline: Outline) -> list[Any]:
    """Returns the tensors of the base that are read."""
    base = outline.models.base
    return [base.checkpoint.tensors[base.names[name]] for name in base.names]


def targets_bytes(outline: Outline) -> int:
    """Returns the bytes of the expert targets of all calibration examples, in memory."""
    total, calibration = 0, outline.data["calibration"]
    times = {task: 1 + outline.method.copies_of(len(size)) for task, size in calibration.items()}
    for task, size in calibration.items():
        spec = outline.target_specs[task]
        if not spec.expert:
            continue
        targets = outline.targets(task, 1, max(1, outline.longest))._replace(labels=None)
        rows = times[task] * len(size)
        if spec.cross_task:
            rows = max(rows, sum(times[other] * len(of) for other, of in calibration.items()))
        by_position, positions = 0, 1
        targets = targets._replace(cross_task=None, prompts=None)
        leaves = jax.tree.leaves(targets, is_leaf=lambda leaf: leaf is None)
        for leaf, by_row in zip(leaves, has_positions(targets, spec), strict=True):
            if leaf is None:
                continue
            if not by_row:
                total += rows * bytes_of(leaf)
            else:
                positions = leaf.shape[1]
                by_position += bytes_of(leaf) // positions
        lengths = times[task] * (int(size.lengths.sum()) or len(size) * positions)
        total += min(MEMORY_BYTES, by_position * lengths)
    return total


def logits_bytes(outline: Outline) -> int:
    """Returns the bytes of the logits of one task's examples in a step, float32."""
    size = outline.recipe.learning.batch_size
    return max(
        4 * int(np.prod(outline.logits(task, size, outline.longest).shape))
        for task in outline.heads
    )
