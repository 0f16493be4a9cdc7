"""Folds the merged backbone tensor by tensor, straight from the checkpoints."""

import dataclasses
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Array

from adamerge_jax.checkpoints.matching import MatchedCheckpoint
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.coefficients.granularities import Granularity
from adamerge_jax.devices import ONE_DEVICE
from adamerge_jax.errors import InputError, shorten
from adamerge_jax.interference import make_step
from adamerge_jax.methods import MergeMethod
from adamerge_jax.mixing import Mixture, materialize_compiled
from adamerge_jax.parameter_names import is_variance
from adamerge_jax.pipeline.blocks import THREADS, fold_tensor
from adamerge_jax.pipeline.initial_merge import (
    merged_tensor,
    method_of,
    read_tensor_delta,
    rounded,
)
from adamerge_jax.pipeline.models import Models


def fold(
    models: Models, coefficients: Coefficients, dtype: np.dtype | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the merged backbone, tensor by tensor, in the order of the base.

    Reads the checkpoints again rather than the task vectors in memory: sums are those of the
    stored weights whatever the representation while learning, and memory stays at one tensor of
    every expert, or at a few blocks of it where the sum is one over stored entries.

    Args:
        models: The base and its experts.
        coefficients: The merge coefficients.
        dtype: The dtype to which the float32 sums are rounded, once; by default each tensor's in
            the base. Tensors that are not mixed stay as they are stored.

    Yields:
        The name of a tensor (without `*`) and its merged value.

    Raises:
        InputError: See `require_fitting`.
    """
    require_fitting(models, coefficients)
    granularity = coefficients.unstacked_granularity
    scales, method = coefficients.scales(), _initial_method(coefficients)
    # A tensor at a time fits on one device, and other processes need not take part.
    models = dataclasses.replace(models, devices=ONE_DEVICE)
    experts = list(models.experts.values())
    # Only then is the sum one over entries as they lie in the files.
    is_stored = (
        not granularity.prepares
        and not coefficients.needs_all_experts
        and all(isinstance(expert, MatchedCheckpoint) for expert in experts)
    )
    # Models that learn list their parameters in another order than those that are only merged.
    place = {tensor: place for place, tensor in enumerate(models.base.checkpoint.tensors)}
    names = sorted(models.base.names, key=lambda name: place[models.base.names[name]])
    with ThreadPoolExecutor(THREADS) as threads:
        for name in names:
            if name not in scales or name in models.kept_from_base:
                merged = models.base.read(name).astype(models.base.dtype(name), copy=False)
            elif is_stored:
                scale = np.asarray(scales[name])
                merged = fold_tensor(name, models.base, experts, scale, threads, dtype)
            else:
                wide = _fold_delta(models, coefficients, granularity, method, name, scales[name])
                merged = rounded(name, wide, dtype or models.base.dtype(name))
            yield name, merged


def require_fitting(models: Models, coefficients: Coefficients) -> None:
    """Refuses coefficients that do not fit the tensors of these models.

    Raises:
        InputError: They mix a parameter that the base does not have, or has in another shape; their
            granularity, an interference step or the initial merge's method is code that may not
            run; or there is no such method.
    """
    # Code that may not run is refused before anything is written.
    _ = coefficients.unstacked_granularity, _initial_method(coefficients)
    for step in coefficients.interference:
        make_step(step.name, step.options)
    source = models.base.checkpoint.source
    for task, head in coefficients.head_tensors.items():
        _require_fitting_head(models, task, head)
    for name, shape in coefficients.shapes.items():
        if name not in models.base.names:
            raise InputError(
                f"the coefficients mix {name}, which the base ({source}) does not have; fold them "
                "with the recipe that they were learned with"
            )
        if shape != models.base.shape(name):
            raise InputError(
                f"the coefficients are for {name} of shape {shape}, the base's ({source}) has "
                f"{models.base.shape(name)}; to another size they carry only as a starting point "
                "(coefficients.start)"
            )


def _require_fitting_head(models: Models, task: str, head: Mapping[str, np.ndarray]) -> None:
    """Refuses a head that is not of the classes and features of the task's expert."""
    expert = models.experts.get(task)
    if expert is None:
        return  # left out of the merge, with its head
    last = models.head_form(task).last_layer
    names = models.head_names(task) if last is None else last.names
    for name, array in head.items():
        fits = name in names
        if fits and models.family.auto_class is not None:
            fits = name in expert.names and expert.read(name).shape == array.shape
        if not fits:
            raise InputError(
                f"the coefficients have {shorten(name)} of shape {array.shape} for the head of "
                f"{task!r}, which its expert ({expert.checkpoint.source}) does not have; fold them "
                "with the experts that they were learned with"
            )


def _initial_method(coefficients: Coefficients) -> MergeMethod | None:
    """Makes the method of the initial merge; None where it is stored or there is none."""
    initial = coefficients.initial_merge
    return None if initial is None or initial.stored else method_of(initial)


def _fold_delta(
    models: Models,
    coefficients: Coefficients,
    granularity: Granularity,
    method: MergeMethod | None,
    name: str,
    scale: Array,
) -> np.ndarray:
    """Returns one merged tensor, float32, from the representation that its granularity needs."""
    start = models.base.read(name).astype(np.float32)
    if name in coefficients.initial_tensors:
        start = coefficients.initial_tensors[name]
    elif method is not None:
        start = merged_tensor(models, method, name, start)
    if coefficients.initial_merge is not None and not np.any(scale):
        return start  # the method's result to the last bit
    delta = read_tensor_delta(models, name, coefficients.interference)
    if delta is None:
        return start  # only experts that are left out changed it
    mixture = Mixture(start, granularity.prepare(name, delta), scale, is_variance(name))
    return np.asarray(materialize_compiled(mixture))
