"""From opened checkpoints to parameters and task vectors, a tensor at a time, and back again.

Peak host memory is what is returned plus one tensor of one expert: no expert is ever loaded whole.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from adamerge_jax.checkpoints.dtypes import FLOAT32, INT8
from adamerge_jax.checkpoints.matching import MatchedCheckpoint, match
from adamerge_jax.checkpoints.peft import Expert
from adamerge_jax.checkpoints.tokenizer_files import load_tokenizer
from adamerge_jax.coefficients.granularities import (
    constant,
    make_granularity,
)
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
    """The backbone of one expert: its own arrays, or for an adapter the base's with lazy factors.

    Args:
        models: The base and its experts.
        task: Whose expert.
        base: The base's backbone.
        dtype: Of the arrays; by default each tensor's in the base.
        memory: The place for an adapter's entries, by default the devices.
    """
    expert = models.experts[task]
    if isinstance(expert, MatchedCheckpoint):
        if isinstance(memory, AbstractMemory):
            return dict(base)
        return load_backbone(models, expert, dtype)
    alone = dataclasses.replace(models, experts={task: expert}, kept=frozenset())
    deltas, _, _ = load_task_vectors(alone, dtype, memory=memory)
    shapes = {name: models.shapes[name] for name in deltas}
    whole = make_granularity("tensor", {}, shapes)
    return mix(base, deltas, whole.scales(whole.init(constant(shapes, 1, 1.0))))


def load_backbone(models: Models, checkpoint: Expert, dtype: np.dtype | None) -> dict[str, Array]:
    """Reads the backbone of the base or of one expert; what an expert lacks is the base's.

    Args:
        models: The base and its experts.
        checkpoint: The one to read.
        dtype: Of the arrays; by default each tensor's in the base.

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
        row[...] = source.read(tensor)
    return array


def load_zero_shot_head(
    models: Models, class_names: Sequence[str], templates: Sequence[str]
) -> dict[str, Array]:
    """Makes a task's head with the base's own text tower and tokenizer.

    Args:
        models: A whole CLIP as the base, and its experts.
        class_names: C names, in the order of the task's labels.
        templates: Sentences with a `{}` for the name.

    Returns:
        Parameters of the head, float32.

    Raises:
        InputError: The base lacks a text tower or a tokenizer, or see `zero_shot_head`.
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
    """Reads what every expert changed in the base.

    Adapters stay factors, unless interference steps ask for entries. Interference steps look at all
    task vectors together, which are then in the host's memory until the steps are done.

    Args:
        models: The base and its experts.
        dtype: Of the deltas; by default each tensor's in the base, float32 for factors. With int8
            entries are rounded as they are read, after the interference steps if there are any;
            factors stay float32: they are small, and their product would have the error of both.
        interference: What is done to the task vectors.
        memory: Where entries are kept, by default on the devices; factors always are there.

    Returns:
        Deltas by name, stacked where the name is; the names without `*` of the tensors that are
        mixed; and the interference steps with what they learned. Parameters that no expert
        changed are in neither.
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
                deltas[name] = _keep(entries, name, memory)
                mixed += changed
        return deltas, mixed, tuple(interference)
    by_parameter, by_tensor = {}, {}
    entry_dtype = None if dtype == INT8 else dtype
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
        # One parameter after the other, so that only one is there twice where it is moved.
        values = by_parameter.pop(name)
        entries = _rounded(values, name, memory) if dtype == INT8 else values
        deltas[name] = _keep(entries, name, memory)
    return deltas, mixed, fitted


def load_head(models: Models, task: str) -> dict[str, np.ndarray]:
    """Reads a task's own head, in the dtype that it is stored in."""
    return {name: models.experts[task].read(name) for name in models.head_names(task)}


def read_delta(
    models: Models,
    name: str,
    tensors: Sequence[str],
    dtype: np.dtype | None,
    memory: Memory = DEVICE,
) -> tuple[LoadedDelta | None, list[str]]:
    """The deltas of all experts for one parameter, and which of its tensors they change.

    None where no adapter touches it: of a table that only the base has, not a row is read.

    Args:
        models: The base and its experts.
        name: Of the parameter; stacked if `tensors` are L.
        tensors: Those that it consists of.
        dtype: Of the deltas; by default that of the base, float32 for factors.
        memory: Where entries are kept.
    """
    experts = list(models.experts.values())
    open_tensors = [tensor for tensor in tensors if tensor not in models.kept]
    low_rank = [
        position
        for position, expert in enumerate(experts)
        if any(expert.has_factors(tensor) for tensor in open_tensors)
    ]
    if not any(expert.changes(tensor) for expert in experts for tensor in open_tensors):
        return None, []
    if not low_rank:
        entries, changed = read_entries(models, name, tensors, dtype, memory)
        return _keep(entries, name, memory), changed
    parts: list[tuple[LoadedDelta, tuple[int, ...]]] = []
    factors, changed = _read_factors(
        models, name, tensors, [experts[k] for k in low_rank], dtype, memory
    )
    parts.append((factors, tuple(low_rank)))
    # An adapter may have factors in one layer of a stack and another layer whole: it is in both.
    whole = [
        position
        for position, expert in enumerate(experts)
        if any(expert.changes(each) and not expert.has_factors(each) for each in open_tensors)
    ]
    if whole:
        entries, also = read_entries(
            models, name, tensors, dtype, memory, [experts[k] for k in whole], factors=False
        )
        if also:
            parts.append((_keep(entries, name, memory), tuple(whole)))
            changed = [tensor for tensor in tensors if tensor in {*changed, *also}]
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
    """Deltas entry by entry, `[K, *shape]` or `[L, K, *shape]`, and the tensors they change.

    Those that are stored as factors are multiplied out; without `factors`, they stay 0.
    """
    experts = list(models.experts.values()) if experts is None else experts
    layers = (len(tensors),) if is_stacked(name) else ()
    shape = models.base.shape(tensors[0])
    dtype = dtype or models.base.dtype(tensors[0])
    values = _empty((*layers, len(experts)), shape, dtype, memory)
    rows = values if layers else [values]
    fill = _may_fill if isinstance(memory, AbstractMemory) else _fill_entries
    changed = [
        tensor
        for tensor, row in zip(tensors, rows, strict=True)
        if fill(models, tensor, experts, row, factors)
    ]
    return values, changed


def _empty(
    leading: tuple[int, ...], shape: tuple[int, ...], dtype: np.dtype, memory: Memory
) -> Entries:
    """Room for deltas of a parameter, rounded as they are written where the dtype is int8."""
    values = memory.empty((*leading, *shape), dtype)
    if dtype != INT8:
        return values
    steps = memory.empty((*leading, *QuantizedEntries.steps_shape(shape)), FLOAT32)
    return QuantizedEntries(values, steps)


def _keep(entries: Entries, name: str, memory: Memory) -> LoadedDelta:
    """Entries that have been filled, as a delta."""
    if isinstance(entries, QuantizedEntries):
        delta = QuantizedDelta(entries.values, entries.steps)
    else:
        delta = DenseDelta(entries)
    return memory.keep(name, delta)


def _rounded(values: np.ndarray, name: str, memory: Memory) -> Entries:
    """Deltas that are in memory as 8-bit integers, where these are to be kept."""
    leading = 1 + is_stacked(name)
    entries = _empty(values.shape[:leading], values.shape[leading:], INT8, memory)
    layers = zip(entries, values, strict=True) if leading == 2 else [(entries, values)]
    for to, layer in layers:
        for row, delta in zip(to, layer, strict=True):
            row[...] = delta
    return entries


def _fill_entries(
    models: Models, tensor: str, experts: Sequence[Expert], out: Entries, with_factors: bool
) -> bool:
    """Writes `tau_k` of some experts into `out`, `[K, *shape]`; whether any differs from 0."""
    kept = tensor in models.kept
    base = None if kept else models.base.read(tensor).astype(np.float32)
    changed = False
    for row, expert in zip(out, experts, strict=True):
        if kept or not expert.changes(tensor) or (expert.has_factors(tensor) and not with_factors):
            row[...] = 0
            continue
        factors = expert.low_rank(tensor)
        if factors is None:
            difference = expert.read(tensor).astype(np.float32) - base
        else:
            difference = factors.left @ factors.right
        changed |= bool(difference.any())
        row[...] = difference
    return changed


def _may_fill(
    models: Models, tensor: str, experts: Sequence[Expert], out: Entries, with_factors: bool
) -> bool:
    """Returns True where some expert may differ from the base; reads no weight."""
    return tensor not in models.kept and any(
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
    """Deltas as factors of the largest rank among experts and layers; zeros beyond their own."""
    dtype = FLOAT32 if dtype in (None, INT8) else dtype
    places = [
        (layer, position)
        for layer, tensor in enumerate(tensors)
        if tensor not in models.kept
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
            left[index][:, :size] = factors.left
            right[index][:size] = factors.right
            # The B that PEFT starts with is 0, and stays so where nothing was trained.
            if factors.left.any() and factors.right.any():
                changed.add(layer)
    delta = LowRankDelta(left, right)
    if not isinstance(memory, AbstractMemory):
        delta = models.devices.delta(name, delta)
    return delta, [tensors[layer] for layer in sorted(changed)]
