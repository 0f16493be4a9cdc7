"""The initial merge: a merge without learning, to which learned coefficients add task vectors.

`merged_tensor` computes one of its tensors in float32. Learning, `adamerge merge` and the fold of a
coefficients file all take them from there, so that they agree bit for bit.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adamerge_jax.checkpoints.dtypes import FLOAT32
from adamerge_jax.checkpoints.finite import all_finite
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.coefficients.granularities import constant, make_granularity, same_options
from adamerge_jax.coefficients.initial_merge import InitialMerge
from adamerge_jax.devices import ONE_DEVICE, fetch
from adamerge_jax.errors import InputError, shorten
from adamerge_jax.interference import FittedStep, apply_steps
from adamerge_jax.methods import MergeMethod, make_method, merged_parameters
from adamerge_jax.parameter_names import is_stacked, stack_depths
from adamerge_jax.pipeline.blocks import overflow_error
from adamerge_jax.pipeline.models import Models
from adamerge_jax.pipeline.read import load_task_vectors, read_delta, read_entries
from adamerge_jax.task_vectors import DenseDelta, LoadedDelta


def fit_initial_merge(models: Models, name: str, options: Mapping[str, Any]) -> InitialMerge:
    """Fits the interference steps of a merge method to the experts' task vectors.

    Args:
        models: The base and its experts.
        name: The name of the method.
        options: Its options.

    Raises:
        InputError: There is no such method, or it refuses an option.
    """
    method = make_method(name, options)
    steps = method.interference
    if steps:
        # The steps alone: all task vectors are not to be in memory while tensors are merged.
        models = dataclasses.replace(models, devices=ONE_DEVICE)
        steps = load_task_vectors(models, None, steps)[2]
    return InitialMerge(name, dict(options), steps, stored=method.needs_data)


def method_of(initial: InitialMerge) -> MergeMethod:
    """Makes the method of an initial merge, with its fitted steps.

    Raises:
        InputError: There is no such method, it may not run, it refuses an option, its steps are
            not those that were fitted, or it needs data and its tensors are not stored.
    """
    method = make_method(initial.name, initial.options)
    if method.needs_data and not initial.stored:
        raise _unrepeatable(initial, "depends on calibration data, and its tensors are not stored")
    fits = len(method.interference) == len(initial.interference) and all(
        step.name == fitted.name and same_options(step.options, fitted.options)
        for step, fitted in zip(method.interference, initial.interference, strict=True)
    )
    if not fits:
        raise _unrepeatable(initial, "has other interference steps than those that were fitted")
    return method._replace(interference=initial.interference)


def _unrepeatable(initial: InitialMerge, reason: str) -> InputError:
    """Returns the error of an initial merge that a coefficients file cannot have."""
    return InputError(
        f"the merge by {shorten(initial.in_words)} {reason}; the coefficients file is damaged or "
        "of another version: merge or learn again"
    )


def merged_names(models: Models) -> list[str]:
    """Returns the names without `*` of the tensors that a method merges: all that may differ."""
    return [
        name
        for name in models.base.names
        if name not in models.kept_from_base
        and any(expert.changes(name) for expert in models.experts.values())
    ]


def merged_tensor(
    models: Models, method: MergeMethod, name: str, base: np.ndarray
) -> Float[np.ndarray, "..."]:
    """Merges one tensor by a method.

    Args:
        models: The base and its experts.
        method: The merge method, with fitted interference steps.
        name: The name of the tensor without `*`.
        base: The base's tensor, `[*shape]`.

    Returns:
        The merged tensor, `[*shape]`, float32.
    """
    delta = read_tensor_delta(models, name, method.interference)
    wide: dict[str, Any] = {name: base.astype(np.float32)}
    if delta is None:
        return wide[name]
    return np.asarray(merged_parameters(method, wide, {name: delta}, len(models.experts))[name])


def load_initial_merge(
    models: Models, initial: InitialMerge, base: Mapping[str, Array], mixed: Collection[str]
) -> dict[str, Array]:
    """Computes the parameters of an initial merge, tensor by tensor.

    Args:
        models: The base and its experts.
        initial: The merge method, with fitted interference steps.
        base: The parameters of the base's backbone.
        mixed: The names without `*` of the tensors that are merged; all others are the base's.

    Returns:
        The merge's parameters by name, `[L, *shape]` where stacked, summed in float32 and rounded
        once to the dtypes of the base's. Those without a merged tensor are the base's arrays.

    Raises:
        InputError: See `method_of`; or a value is more than its dtype holds.
    """
    method, to_merge = method_of(initial), set(mixed)
    one_device = dataclasses.replace(models, devices=ONE_DEVICE)
    parameters = dict(base)
    for name, parameter in base.items():
        tensors = models.tensors(name)
        if to_merge.isdisjoint(tensors):
            continue
        array = np.empty(models.shapes[name], parameter.dtype)
        for row, tensor in zip(array if is_stacked(name) else [array], tensors, strict=True):
            values = models.base.read(tensor)
            if tensor in to_merge:
                values = merged_tensor(one_device, method, tensor, values)
            row[...] = rounded(tensor, values, array.dtype)
        parameters[name] = models.devices.parameter(name, array)
    return parameters


def only_mixed(
    models: Models,
    merged: Mapping[str, Array],
    base: Mapping[str, Array],
    mixed: Collection[str],
) -> dict[str, Array]:
    """Returns merged parameters where tensors are mixed, and the base's in all other tensors.

    Args:
        models: The base and its experts.
        merged: The merge's parameters by name, `[L, *shape]` where stacked.
        base: The base's parameters.
        mixed: The names without `*` of the tensors that are mixed.
    """
    names, parameters = set(mixed), dict(base)
    for name in base:
        is_mixed = np.array([tensor in names for tensor in models.tensors(name)])
        if is_mixed.all():
            parameters[name] = merged[name]
        elif is_mixed.any():
            layers = is_mixed.reshape(-1, *(1 for _ in base[name].shape[1:]))
            parameters[name] = jnp.where(layers, merged[name], base[name])
    return parameters


def stored_tensors(
    models: Models, parameters: Mapping[str, Array], mixed: Collection[str]
) -> dict[str, np.ndarray]:
    """Returns the tensors of a merge that cannot be computed again, for its coefficients file.

    Args:
        models: The base and its experts.
        parameters: The merge's parameters by name, `[L, *shape]` where stacked.
        mixed: The names without `*` of the tensors that are merged.

    Returns:
        The merged tensors, `[*shape]`, float32, by the names in `mixed`.
    """
    by_tensor: dict[str, np.ndarray] = {}
    for name, parameter in parameters.items():
        array = fetch(parameter).astype(np.float32)
        rows = array if is_stacked(name) else [array]
        by_tensor |= dict(zip(models.tensors(name), rows, strict=True))
    return {tensor: by_tensor[tensor] for tensor in mixed}


def coefficients_of_method(
    models: Models, initial: InitialMerge, tensors: Mapping[str, np.ndarray] | None = None
) -> Coefficients:
    """Returns the coefficients file of a merge by a method alone: all coefficients are 0.

    Args:
        models: The base and its experts.
        initial: The merge method, with fitted interference steps.
        tensors: The merged tensors of a stored merge; see `stored_tensors`.

    Raises:
        InputError: No expert changes a tensor that is merged.
    """
    shapes = {name: models.base.shape(name) for name in merged_names(models)}
    if not shapes:
        raise InputError("no expert differs from the base in any parameter that is merged")
    base, *experts = models.sources
    zeros = make_granularity("task", {}, shapes).init(constant(shapes, len(experts), 0.0))
    return Coefficients(
        values={group: np.asarray(array[0], np.float32) for group, array in zeros.items()},
        granularity="task",
        granularity_options={},
        interference=(),
        constraint="free",
        shapes=shapes,
        base=base,
        experts=tuple(experts),
        objective="nothing",
        seed=0,
        step=0,
        depths=stack_depths(models.base.names),
        initial=0.0,
        initial_merge=initial,
        initial_tensors=tensors or {},
    )


def rounded(name: str, merged: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns a merged tensor in its dtype, and refuses values that it cannot hold."""
    with np.errstate(over="ignore"):
        narrow = merged.astype(dtype)
    if not all_finite(narrow):
        raise overflow_error(name, narrow.dtype)
    return narrow


def read_tensor_delta(
    models: Models, name: str, interference: Sequence[FittedStep]
) -> LoadedDelta | None:
    """Reads the task vectors of one tensor in float32, after fitted interference steps."""
    if interference:
        values, _ = read_entries(models, name, [name], FLOAT32)
        return DenseDelta(apply_steps(interference, name, values))
    delta, _ = read_delta(models, name, [name], FLOAT32)
    return delta
