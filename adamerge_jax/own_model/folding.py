"""Merges models in memory by coefficients that are there already."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from adamerge_jax.coefficients.file import IN_MEMORY, Coefficients, Source
from adamerge_jax.coefficients.identities import namesake, other_contents
from adamerge_jax.errors import InputError
from adamerge_jax.interference import apply_steps
from adamerge_jax.mixing import Mixture, materialize_compiled
from adamerge_jax.own_model.leaves import (
    Leaves,
    Model,
    places,
    require_alike,
    take_apart,
)
from adamerge_jax.parameter_names import is_variance, matches
from adamerge_jax.task_vectors import DenseDelta


def fold(
    base: Model,
    experts: Mapping[str, Any] | Sequence[Any],
    coefficients: Coefficients | Path | str,
    *,
    task: str | None = None,
    head_parameters: Sequence[str] = (),
    allow_other_models: bool = False,
) -> Model:
    """Merges models in memory by the coefficients of an earlier merge, without learning.

    The sum is one of float32, rounded once to the base's dtype: the same models and coefficients
    give the same merge bit for bit.

    Args:
        base: The base, any pytree of arrays `[*shape]`, or a Flax NNX module.
        experts: The experts by name, or a list in the order of the coefficients.
        coefficients: The coefficients, or their file.
        task: The task whose own parameters the result is to have; by default it has the base's.
        head_parameters: Name patterns of the parameters that each task keeps for itself.
        allow_other_models: True for models that are not those of the coefficients.

    Returns:
        The merge, a model like the base.

    Raises:
        InputError: Models and coefficients do not belong together, or the file cannot be read.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> import adamerge_jax as am
        >>> base = {"kernel": jnp.ones((3, 2))}
        >>> experts = {f"class_{c}": {"kernel": base["kernel"].at[:, c].add(1.0)} for c in (0, 1)}
        >>> def forward(parameters, inputs):
        ...     return inputs @ parameters["kernel"]
        >>> data = {name: np.eye(3, dtype=np.float32).repeat(8, 0) for name in experts}
        >>> merged = am.merge(base, experts, forward, data, steps=4, progress=False)
        >>> again = am.fold(base, experts, merged.coefficients)
        >>> bool((again["kernel"] == merged.parameters["kernel"]).all())
        True
    """
    if isinstance(coefficients, str | os.PathLike):
        coefficients = Coefficients.load(coefficients)
    if coefficients.initial_merge is not None:
        raise InputError(
            f"the coefficients are added to a merge by {coefficients.initial_merge.in_words}, "
            "which is made from checkpoints: fold them with `adamerge fold`"
        )
    leaves = take_apart(base, "base")
    models = _in_order(experts, coefficients)
    apart = {name: take_apart(model, f"expert {name!r}") for name, model in models.items()}
    heads = [name for name in leaves.parameters if matches(name, head_parameters)]
    for expert in apart.values():
        require_alike(leaves, expert, heads)
    if not allow_other_models:
        _require_same_models(coefficients, leaves, apart)
    if task is not None and task not in apart:
        raise InputError(f"task: there is no expert {task!r}; the experts are {', '.join(apart)}")
    coefficients = coefficients.of_experts(list(apart))
    arrays = fold_leaves(leaves, apart, coefficients)
    if task is not None:
        arrays |= heads_of(apart[task], coefficients, task, heads)
    return leaves.rebuild(arrays)


def fold_leaves(
    base: Leaves[Any],
    experts: Mapping[str, Leaves[Any]],
    coefficients: Coefficients,
) -> dict[str, Array]:
    """Returns all arrays of a merge by name, each like the base's: of NumPy, or on its devices.

    Args:
        base: The base.
        experts: The experts by name, in the order of the coefficients.
        coefficients: The coefficients.

    Raises:
        InputError: The coefficients are for a parameter that the base does not have.
    """
    tensors = {name: (parameter, layer) for name, parameter, layer in places(base.parameters)}
    scales, granularity = coefficients.scales(), coefficients.unstacked_granularity
    arrays = base.arrays
    layers: dict[str, dict[int | None, Array]] = {}
    for name, shape in coefficients.shapes.items():
        parameter, layer = tensors.get(name, (None, None))
        if parameter is None:
            raise InputError(
                f"the coefficients mix {name!r}, which the base does not have; it has e.g. "
                f"{next(iter(tensors))!r}"
            )
        place = () if layer is None else layer
        start, *others = (
            np.asarray(model.parameters[parameter][place], np.float32)
            for model in (base, *experts.values())
        )
        if start.shape != tuple(shape):
            raise InputError(
                f"the coefficients are for {name!r} of shape {tuple(shape)}, the base has "
                f"{start.shape}"
            )
        values = np.stack([other - start for other in others])
        delta = granularity.prepare(
            name, DenseDelta(apply_steps(coefficients.interference, name, values))
        )
        mixture = Mixture(jnp.asarray(start), delta, scales[name], is_variance(name))
        merged = materialize_compiled(mixture)
        layers.setdefault(parameter, {})[layer] = merged
    for parameter, by_layer in layers.items():
        whole = base.parameters[parameter]
        wide = by_layer[None] if None in by_layer else _joined(whole, by_layer)
        arrays[parameter] = _like(whole, wide)
    return arrays


def heads_of(
    expert: Leaves[Any], coefficients: Coefficients, task: str, names: Iterable[str]
) -> dict[str, Array]:
    """Returns the parameters that a task keeps for itself: learned ones, or its expert's.

    Args:
        expert: The task's expert.
        coefficients: The coefficients, with the heads that were learned beside them.
        task: The task.
        names: The names of the parameters.
    """
    learned = coefficients.head_tensors.get(task, {})
    heads = {}
    for name in dict.fromkeys([*names, *learned]):
        own = expert.parameters[name]
        heads[name] = _like(own, learned[name]) if name in learned else own
    return heads


def _joined(stacked: Array, by_layer: Mapping[int | None, Array]) -> np.ndarray:
    """Returns a stacked parameter with some of its layers replaced, float32."""
    wide = np.array(stacked, np.float32)
    for layer, values in by_layer.items():
        wide[layer] = values
    return wide


def _like(array: Array, values: Array | np.ndarray) -> Array:
    """Returns values in the dtype of an array, and where that lies."""
    narrow = np.asarray(values).astype(array.dtype)
    return narrow if isinstance(array, np.ndarray) else jax.device_put(narrow, array.sharding)


def _in_order(
    experts: Mapping[str, Any] | Sequence[Any], coefficients: Coefficients
) -> dict[str, Any]:
    """Returns the experts by name, in the order of the coefficients."""
    names = coefficients.names
    if not isinstance(experts, Mapping):
        if len(experts) != len(names):
            raise InputError(
                f"experts: there are {len(experts)}, the coefficients are for {len(names)}: "
                f"{', '.join(names)}"
            )
        return dict(zip(names, experts, strict=True))
    needed = [
        name
        for name in names
        if coefficients.needs_all_experts or name not in coefficients.left_out
    ]
    if missing := [name for name in needed if name not in experts]:
        raise InputError(
            f"experts: {missing[0]!r} is missing; the coefficients are for {', '.join(names)}"
        )
    return {name: experts[name] for name in names if name in experts}


def _require_same_models(
    coefficients: Coefficients, base: Leaves[Any], experts: Mapping[str, Leaves[Any]]
) -> None:
    sources = sources_of(base, experts)
    changed = other_contents([coefficients.base, *coefficients.experts], sources)
    if changed:
        name, words = next(iter(changed.items()))
        learned = next(s for s in (coefficients.base, *coefficients.experts) if s.name == name)
        raise InputError(
            f"the coefficients were {words}{namesake(learned, sources)}; give the models that "
            "they were learned for, or allow_other_models=True"
        )


def sources_of(base: Leaves[Any], experts: Mapping[str, Leaves[Any]]) -> tuple[Source, ...]:
    """Returns the origins of models in memory: the base, then the experts."""
    models = {"base": base, **experts}
    return tuple(Source(name, IN_MEMORY, None, leaves.identity) for name, leaves in models.items())
