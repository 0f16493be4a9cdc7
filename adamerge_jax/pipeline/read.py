"""Reads parameters and task vectors from opened checkpoints, a tensor at a time.

The peak of host memory is the result plus one tensor of one expert: no expert is loaded whole.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from adamerge_jax.checkpoints.dtypes import FLOAT32, INT8, INTEGERS
from adamerge_jax.checkpoints.finite import all_finite, narrowed, sum_of_squares
from adamerge_jax.checkpoints.matching import MatchedCheckpoint, match
from adamerge_jax.checkpoints.peft import Expert
from adamerge_jax.checkpoints.tokenizer_files import load_tokenizer
from adamerge_jax.coefficients.granularities import (
    constant,
    make_granularity,
)
from adamerge_jax.errors import InputError
from adamerge_jax.interference import FittedStep, fit_steps
from adamerge_jax.mixing import Mixture, mix
from adamerge_jax.models.zero_shot import text_network, zero_shot_head
from adamerge_jax.parameter_names import is_stacked, tensors_of, unstacked_shapes
from adamerge_jax.pipeline.models import Models
from adamerge_jax.task_vectors import (
    DenseDelta,
    JoinedDelta,
    LoadedDelta,
    LowRankDelta,
    QuantizedDelta,
)
from adamerge_jax.task_vectors.entries import Entries
from adamerge_jax.task_vectors.offload.memory import (
    AbstractMemory,
    DeviceMemory,
    Memory,
    aligned_empty,
)
from adamerge_jax.task_vectors.quantized import QuantizedEntries

DEVICE = DeviceMemory()


def load_expert(
    models: Models,
    task: str,
    base: Mapping[str, Array],
    dtype: np.dtype | None,
    memory: Memory | None = None,
) -> dict[str, Array | Mixture]:
    """Reads the backbone of one expert.

    Args:
        models: The base and its experts.
        task: The task of the expert.
        base: The parameters of the base's backbone.
        dtype: The dtype of the arrays; by default each tensor's in the base.
        memory: The place for an adapter's entries, by default the devices.

    Returns:
        The parameters by name, `[L, *shape]` where stacked: the expert's arrays, or for an adapter
        the base's with lazy factors.
    """
    expert = models.experts[task]
    if isinstance(expert, MatchedCheckpoint):
        if isinstance(memory, AbstractMemory):
            return dict(base)
        return load_backbone(models, expert, dtype)
    one_expert = dataclasses.replace(models, experts={task: expert}, kept_from_base=frozenset())
    deltas, _, _ = load_task_vectors(one_expert, dtype, memory=memory)
    shapes = {name: models.shapes[name] for name in deltas}
    per_tensor = make_granularity("tensor", {}, shapes)
    return mix(base, deltas, per_tensor.scales(per_tensor.init(constant(shapes, 1, 1.0))))


def load_backbone(models: Models, checkpoint: Expert, dtype: np.dtype | None) -> dict[str, Array]:
    """Reads the backbone of the base or of one expert; what an expert lacks is the base's.

    Args:
        models: The base and its experts.
        checkpoint: The checkpoint to read.
        dtype: The dtype of the arrays; by default each tensor's in the base.

    Returns:
        Arrays by name, `[L, *shape]` where stacked.
    """
    return {
        name: models.devices.parameter(name, read_parameter(models, checkpoint, name, dtype))
        for name in models.shapes
    }


def read_parameter(
    models: Models, checkpoint: Expert, name: str, dtype: np.dtype | None
) -> np.ndarray:
    """Reads one parameter of the backbone, `[L, *shape]` where stacked; see `load_backbone`."""
    tensors = models.tensors(name)
    array = aligned_empty(models.shapes[name], dtype or models.base.dtype(tensors[0]))
    for row, tensor in zip(array if is_stacked(name) else [array], tensors, strict=True):
        source = checkpoint if tensor in checkpoint.names else models.base
        row[...] = narrowed(
            source.read(tensor),
            array.dtype,
            tensor=tensor,
            source=source.checkpoint.source,
            role=source.role,
            field="dtype",
        )
    return array


def load_zero_shot_head(
    models: Models, class_names: Sequence[str], templates: Sequence[str]
) -> dict[str, Array]:
    """Makes a task's head with the base's own text tower and tokenizer.

    Args:
        models: The base, which is a whole CLIP, and its experts.
        class_names: The names of the C classes, in the order of the task's labels.
        templates: Sentences with a `{}` for the name.

    Returns:
        The parameters of the head by name, float32.

    Raises:
        InputError: The base lacks a text tower or a tokenizer, or `zero_shot_head` refuses them.
    """
    shapes = {name: leaf.shape for name, leaf in text_network(models.config).shapes.items()}
    tower = match(models.base.checkpoint, unstacked_shapes(shapes), role="base", allow_extra=True)
    parameters = {
        name: np.stack([tower.read(tensor) for tensor in tensors_of(name, shape)])
        if is_stacked(name)
        else tower.read(name)
        for name, shape in shapes.items()
    }
    wide = {name: jnp.asarray(array, jnp.float32) for name, array in parameters.items()}
    tokenizer = load_tokenizer(models.base.checkpoint, models.base.role)
    return zero_shot_head(models.config, wide, tokenizer, class_names, templates)


def load_task_vectors(
    models: Models,
    dtype: np.dtype | None,
    interference: Sequence[FittedStep] = (),
    memory: Memory | None = None,
) -> tuple[dict[str, LoadedDelta], list[str], tuple[FittedStep, ...]]:
    """Reads the task vectors of all experts.

    Adapters stay factors, unless there are interference steps: these need the entries of all task
    vectors together, which are then in the host's memory until the steps are done.

    Args:
        models: The base and its experts.
        dtype: The dtype of the deltas; by default each tensor's in the base, float32 for factors.
            With integers, entries are rounded as they are read, after the interference steps if
            there are any; factors stay float32: they are small, and their product would have the
            error of both.
        interference: The steps that change the task vectors.
        memory: The place of entries, by default the devices; factors are always there.

    Returns:
        The deltas by parameter name, `[K, *shape]` or `[L, K, *shape]`; the names without `*` of
        the tensors that are mixed; and the fitted interference steps. Parameters that no expert
        changed are left out.
    """
    memory = memory or DeviceMemory(models.devices)
    deltas, mixed = {}, []
    if not interference:
        for name in models.shapes:
            delta, changed = read_delta(models, name, models.tensors(name), dtype, memory)
            if changed:
                deltas[name] = delta
                mixed += changed
        return deltas, mixed, ()
    if isinstance(memory, AbstractMemory):
        for name in models.shapes:
            entries, changed = read_entries(models, name, models.tensors(name), dtype, memory)
            if changed:
                deltas[name] = _make_delta(entries, name, memory)
                mixed += changed
        return deltas, mixed, tuple(interference)
    by_parameter: dict[str, Entries] = {}
    by_tensor: dict[str, Entries] = {}
    entry_dtype = None if dtype in INTEGERS.values() else dtype
    for name in models.shapes:
        tensors = models.tensors(name)
        values, changed = read_entries(models, name, tensors, entry_dtype, DEVICE)
        if changed:
            by_parameter[name] = values
            rows = zip(tensors, values if is_stacked(name) else [values], strict=True)
            by_tensor |= {tensor: row for tensor, row in rows if tensor in changed}
    fitted = fit_steps(interference, by_tensor)
    mixed = list(by_tensor)
    by_tensor.clear()
    for name in list(by_parameter):
        # One parameter after the other, so that only one exists twice while it is moved.
        values = by_parameter.pop(name)
        is_rounded = dtype in INTEGERS.values()
        entries = _quantize(values, name, dtype, memory) if is_rounded else values
        deltas[name] = _make_delta(entries, name, memory)
    return deltas, mixed, fitted


def load_head(models: Models, task: str) -> dict[str, np.ndarray]:
    """Reads the parameters of a task's head by name, in the dtype of the checkpoint."""
    return {name: models.experts[task].read(name) for name in models.head_names(task)}


def read_delta(
    models: Models,
    name: str,
    tensors: Sequence[str],
    dtype: np.dtype | None,
    memory: Memory = DEVICE,
) -> tuple[LoadedDelta | None, list[str]]:
    """Reads the deltas of all experts for one parameter.

    Args:
        models: The base and its experts.
        name: The name of the parameter, stacked or not.
        tensors: The names of its tensors; L of them if it is stacked.
        dtype: The dtype of the deltas; by default that of the base, float32 for factors.
        memory: The place of entries.

    Returns:
        The deltas, `[K, *shape]` or `[L, K, *shape]`, and the names of the tensors that experts
        change. The deltas are None if no expert touches the parameter, of which nothing is read.
    """
    experts = list(models.experts.values())
    mergeable = [tensor for tensor in tensors if tensor not in models.kept_from_base]
    low_rank = [
        position
        for position, expert in enumerate(experts)
        if any(expert.has_factors(tensor) for tensor in mergeable)
    ]
    if not any(expert.changes(tensor) for expert in experts for tensor in mergeable):
        return None, []
    if not low_rank:
        entries, changed = read_entries(models, name, tensors, dtype, memory)
        return _make_delta(entries, name, memory), changed
    factors, changed = _read_factors(
        models, name, tensors, [experts[k] for k in low_rank], dtype, memory
    )
    parts: list[tuple[LoadedDelta, tuple[int, ...]]] = [(factors, tuple(low_rank))]
    # An adapter may have factors in one layer of a stack and another layer whole: it is in both.
    whole = [
        position
        for position, expert in enumerate(experts)
        if any(expert.changes(t) and not expert.has_factors(t) for t in mergeable)
    ]
    if whole:
        entries, changed_entries = read_entries(
            models, name, tensors, dtype, memory, [experts[k] for k in whole], factors=False
        )
        if changed_entries:
            parts.append((_make_delta(entries, name, memory), tuple(whole)))
            changed = [tensor for tensor in tensors if tensor in {*changed, *changed_entries}]
    if len(parts) == 1 and len(low_rank) == len(experts):
        return factors, changed
    deltas, positions = zip(*parts, strict=True)
    return JoinedDelta(deltas, positions, len(experts)), changed


def read_entries(
    models: Models,
    name: str,
    tensors: Sequence[str],
    dtype: np.dtype | None,
    memory: Memory = DEVICE,
    experts: Sequence[Expert] | None = None,
    *,
    factors: bool = True,
) -> tuple[Entries, list[str]]:
    """Reads the deltas of one parameter entry by entry.

    Args:
        models: The base and its experts.
        name: The name of the parameter, stacked or not.
        tensors: The names of its tensors; L of them if it is stacked.
        dtype: The dtype of the entries; by default that of the base.
        memory: The place of the entries.
        experts: The K experts; by default all.
        factors: If True, deltas that are stored as factors are multiplied out; else they stay 0.

    Returns:
        The entries, `[K, *shape]` or `[L, K, *shape]`, and the names of the tensors that differ
        from the base.
    """
    experts = list(models.experts.values()) if experts is None else experts
    layers = (len(tensors),) if is_stacked(name) else ()
    shape = models.base.shape(tensors[0])
    dtype = dtype or models.base.dtype(tensors[0])
    values = _allocate((*layers, len(experts)), shape, dtype, memory)
    rows = _rows(values) if layers else [values]
    fill = _may_differ if isinstance(memory, AbstractMemory) else _fill_entries
    changed = [
        tensor
        for tensor, row in zip(tensors, rows, strict=True)
        if fill(models, tensor, experts, row, factors)
    ]
    return values, changed


def _rows(entries: Entries) -> Iterable[Entries]:
    """Returns the parts along the first axis, each of which can be written to.

    Iterating over a NumPy array of single values makes numbers, not parts of it.
    """
    if isinstance(entries, np.ndarray):
        return [entries[row, ...] for row in range(len(entries))]
    return entries


def _allocate(
    leading: tuple[int, ...], shape: tuple[int, ...], dtype: np.dtype, memory: Memory
) -> Entries:
    """Allocates the deltas of a parameter; integers are rounded as they are written.

    Vectors are small and sensitive: they have 8 bits at least.
    """
    if dtype in INTEGERS.values() and len(shape) < 2:
        dtype = INT8
    values = memory.empty((*leading, *shape), dtype)
    if dtype not in INTEGERS.values():
        return values
    steps = memory.empty((*leading, *QuantizedEntries.steps_shape(shape, dtype)), FLOAT32)
    return QuantizedEntries(values, steps)


def _make_delta(entries: Entries, name: str, memory: Memory) -> LoadedDelta:
    """Makes a delta of entries that have been filled."""
    if isinstance(entries, QuantizedEntries):
        delta = QuantizedDelta(entries.values, entries.steps)
    else:
        delta = DenseDelta(entries)
    return memory.keep(name, delta)


def _quantize(values: np.ndarray, name: str, dtype: np.dtype, memory: Memory) -> Entries:
    """Rounds deltas to integers, in the memory in which these are kept."""
    leading = 1 + is_stacked(name)
    entries = _allocate(values.shape[:leading], values.shape[leading:], dtype, memory)
    layers = zip(entries, values, strict=True) if leading == 2 else [(entries, values)]
    for layer_entries, layer_values in layers:
        for row, delta in zip(layer_entries, layer_values, strict=True):
            row[...] = delta
    return entries


def _fill_entries(
    models: Models, tensor: str, experts: Sequence[Expert], out: Entries, with_factors: bool
) -> bool:
    """Writes `tau_k` into `out`, `[K, *shape]`; returns True if any entry differs from 0."""
    is_kept = tensor in models.kept_from_base
    base = None if is_kept else models.base.read(tensor).astype(np.float32)
    changed = False
    for row, expert in zip(_rows(out), experts, strict=True):
        skipped = expert.has_factors(tensor) and not with_factors
        if is_kept or skipped or not expert.changes(tensor):
            row[...] = 0
            continue
        factors = expert.low_rank(tensor)
        if factors is None:
            with np.errstate(over="ignore"):
                difference = expert.read(tensor).astype(np.float32, copy=False) - base
        else:
            difference = factors.left @ factors.right
        # One sum tells of nearly all tensors that they differ, and that all entries are finite.
        squares = sum_of_squares(difference)
        changed |= bool(squares > 0 or difference.any())
        if not np.isfinite(squares):
            _require_finite_difference(difference, tensor, expert)
        row[...] = _narrowed_delta(difference, row.dtype, tensor, expert)
    return changed


def _require_finite_difference(difference: np.ndarray, tensor: str, expert: Expert) -> None:
    """Refuses a difference of two finite tensors that float32 cannot hold."""
    if not all_finite(difference):
        raise InputError(
            f"{expert.role} ({expert.checkpoint.source}): the difference of {tensor} from the "
            "base's is more than float32 holds; their training has probably diverged: use an "
            "earlier checkpoint, or leave it out"
        )


def _narrowed_delta(values: np.ndarray, dtype: np.dtype, tensor: str, expert: Expert) -> np.ndarray:
    """Returns a part of a task vector in the dtype in which it is kept."""
    return narrowed(
        values,
        dtype,
        tensor=f"the task vector of {tensor}",
        source=expert.checkpoint.source,
        role=expert.role,
        field="task_vectors.dtype",
    )


def _may_differ(
    models: Models, tensor: str, experts: Sequence[Expert], out: Entries, with_factors: bool
) -> bool:
    """Returns True if some expert may differ from the base; reads no weight."""
    return tensor not in models.kept_from_base and any(
        expert.changes(tensor) and (with_factors or not expert.has_factors(tensor))
        for expert in experts
    )


def _read_factors(
    models: Models,
    name: str,
    tensors: Sequence[str],
    experts: Sequence[Expert],
    dtype: np.dtype | None,
    memory: Memory,
) -> tuple[LowRankDelta, list[str]]:
    """Reads deltas as factors, padded with zeros to the largest rank of experts and layers."""
    dtype = FLOAT32 if dtype in (None, *INTEGERS.values()) else dtype
    places = [
        (layer, position)
        for layer, tensor in enumerate(tensors)
        if tensor not in models.kept_from_base
        for position, expert in enumerate(experts)
        if expert.has_factors(tensor)
    ]
    rank = max(experts[position].rank(tensors[layer]) for layer, position in places)
    height, width = models.base.shape(tensors[0])
    layers = (len(tensors),) if is_stacked(name) else ()
    shapes = (*layers, len(experts), height, rank), (*layers, len(experts), rank, width)
    if isinstance(memory, AbstractMemory):
        left, right = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
        changed = {layer for layer, _ in places}
    else:
        left, right = (np.zeros(shape, dtype) for shape in shapes)
        changed = set()
        for layer, position in places:
            factors = experts[position].low_rank(tensors[layer])
            index = (layer, position) if layers else position
            size = factors.right.shape[0]
            expert, tensor = experts[position], tensors[layer]
            left[index][:, :size] = _narrowed_delta(factors.left, dtype, tensor, expert)
            right[index][:size] = _narrowed_delta(factors.right, dtype, tensor, expert)
            # The B that PEFT starts with is 0, and stays so where nothing was trained.
            if factors.left.any() and factors.right.any():
                changed.add(layer)
    delta = LowRankDelta(left, right)
    if not isinstance(memory, AbstractMemory):
        delta = models.devices.delta(name, delta)
    return delta, [tensors[layer] for layer in sorted(changed)]
