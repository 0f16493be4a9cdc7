"""Folds the merged backbone tensor by tensor, straight from the checkpoints."""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Array

from adamerge_jax.checkpoints.dtypes import FLOAT32
from adamerge_jax.checkpoints.finite import all_finite
from adamerge_jax.checkpoints.matching import MatchedCheckpoint
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.coefficients.granularities import Granularity
from adamerge_jax.devices import ONE_DEVICE
from adamerge_jax.errors import InputError
from adamerge_jax.interference import FittedStep, apply_steps, make_step
from adamerge_jax.methods import MergeMethod, merged_parameters
from adamerge_jax.mixing import Mixture, materialize_compiled
from adamerge_jax.pipeline.blocks import THREADS, fold_tensor, overflow_error
from adamerge_jax.pipeline.models import Models
from adamerge_jax.pipeline.read import load_task_vectors, read_delta, read_entries
from adamerge_jax.task_vectors import DenseDelta, LoadedDelta


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
    scales = coefficients.scales()
    # A tensor at a time fits on one device, and other processes need not take part.
    models = dataclasses.replace(models, devices=ONE_DEVICE)
    experts = list(models.experts.values())
    # Only then is the sum one over entries as they lie in the files.
    is_stored = (
        not granularity.prepares
        and not coefficients.interference
        and all(isinstance(expert, MatchedCheckpoint) for expert in experts)
    )
    with ThreadPoolExecutor(THREADS) as threads:
        for name in models.base.names:
            if name not in scales or name in models.kept_from_base:
                yield name, models.base.read(name)
            elif is_stored:
                scale = np.asarray(scales[name])
                yield name, fold_tensor(name, models.base, experts, scale, threads, dtype)
            else:
                merged = _fold_delta(models, coefficients, granularity, name, scales[name])
                yield name, _rounded(name, merged, dtype or models.base.dtype(name))


def require_fitting(models: Models, coefficients: Coefficients) -> None:
    """Refuses coefficients that do not fit the tensors of these models.

    Raises:
        InputError: They mix a parameter that the base does not have, or has in another shape, or
            their granularity or an interference step is code that may not run.
    """
    # Code that may not run is refused before anything is written.
    _ = coefficients.unstacked_granularity
    for step in coefficients.interference:
        make_step(step.name, step.options)
    source = models.base.checkpoint.source
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


def merge_tensors(
    models: Models, method: MergeMethod, dtype: np.dtype | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Merges by a method that learns nothing, tensor by tensor, in the order of the base.

    Args:
        models: The base and its experts.
        method: The merge method.
        dtype: The dtype of merged tensors; by default each tensor's in the base. Tensors that no
            expert changes stay as they are stored.

    Yields:
        The name of a tensor (without `*`) and its merged value.
    """
    models = dataclasses.replace(models, devices=ONE_DEVICE)
    interference: tuple[FittedStep, ...] = ()
    if method.interference:
        # The steps alone: all task vectors are not to be in memory while tensors are merged.
        interference = load_task_vectors(models, None, method.interference)[2]
    for name in models.base.names:
        delta = None
        if name not in models.kept_from_base:
            delta = _read_tensor_delta(models, name, interference)
        tensor = models.base.read(name)
        if delta is None:
            yield name, tensor
            continue
        base = {name: tensor.astype(np.float32)}
        merged = merged_parameters(method, base, {name: delta}, len(models.experts))
        yield name, _rounded(name, np.asarray(merged[name]), dtype or tensor.dtype)


def _rounded(name: str, merged: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns a merged tensor in its dtype, and refuses values that it cannot hold."""
    with np.errstate(over="ignore"):
        rounded = merged.astype(dtype)
    if not all_finite(rounded):
        raise overflow_error(name, rounded.dtype)
    return rounded


def _fold_delta(
    models: Models, coefficients: Coefficients, granularity: Granularity, name: str, scale: Array
) -> np.ndarray:
    """Returns one merged tensor, float32, from the representation that its granularity needs."""
    tensor = models.base.read(name)
    delta = _read_tensor_delta(models, name, coefficients.interference)
    if delta is None:
        return tensor  # only experts that are left out changed it
    mixture = Mixture(tensor.astype(np.float32), granularity.prepare(name, delta), scale)
    return np.asarray(materialize_compiled(mixture))


def _read_tensor_delta(
    models: Models, name: str, interference: Sequence[FittedStep]
) -> LoadedDelta | None:
    """Reads the task vectors of one tensor in float32, after fitted interference steps."""
    if interference:
        values, _ = read_entries(models, name, [name], FLOAT32)
        return DenseDelta(apply_steps(interference, name, values))
    delta, _ = read_delta(models, name, [name], FLOAT32)
    return delta
