"""The user's arrays as examples by task, and as what a `forward` is called with."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from adamerge_jax.data.arrays import ArrayExamples
from adamerge_jax.errors import InputError, shorten

Array: TypeAlias = jax.Array | np.ndarray[Any, Any]

Inputs: TypeAlias = Array | Mapping[str, Array]
"""Inputs of N examples: an array `[N, ...]`, or arrays by name."""

TaskData: TypeAlias = Inputs | tuple[Inputs, Array]
"""Inputs of a task's examples, or inputs and labels, `[N]` (`[N, T]` of tokens)."""

Data: TypeAlias = Mapping[str, TaskData] | Sequence[TaskData]
"""The examples of each task, by name or in the order of the experts."""

_ONLY = "inputs"
"""The name of inputs that are one array."""


def name_experts(
    experts: Mapping[str, Any] | Sequence[Any], data: Data, argument: str = "data"
) -> tuple[dict[str, Any], dict[str, TaskData]]:
    """Returns experts and data by the names of tasks, in the order of the experts.

    Names are those of the experts, or else those of the data; without any they are `expert_0`,
    `expert_1`, ... The argument is that of `merge`, for messages.

    Raises:
        InputError: There are no experts, or data and experts are not those of the same tasks.
    """
    if isinstance(data, jax.Array | np.ndarray) or not isinstance(data, Mapping | Sequence):
        raise InputError(
            f"{argument}: is {_kind(data)}, expected the examples of each task: by name, or a list "
            "in the order of the experts"
        )
    if not isinstance(experts, Mapping) and not isinstance(experts, list | tuple):
        raise InputError(
            f"experts: is {_kind(experts)}, expected a list of models, or a mapping by name"
        )
    if not experts:
        raise InputError("experts: there are none; give at least one")
    if len(data) != len(experts):
        raise InputError(
            f"{argument}: is of {len(data)} tasks, and there are {len(experts)} experts; give "
            "examples of the task of each expert"
        )
    if isinstance(experts, Mapping):
        names = list(experts)
    elif isinstance(data, Mapping):
        names = list(data)
    else:
        names = [f"expert_{position}" for position in range(len(experts))]
    if not isinstance(data, Mapping):
        data = dict(zip(names, data, strict=True))
    if missing := [name for name in names if name not in data]:
        raise InputError(
            f"{argument}: {missing[0]!r} is missing; found {', '.join(map(repr, data))}, expected "
            "examples under the name of each expert"
        )
    models = experts.values() if isinstance(experts, Mapping) else experts
    return dict(zip(names, models, strict=True)), {name: data[name] for name in names}


def make_examples(data: Mapping[str, TaskData], argument: str = "data") -> dict[str, ArrayExamples]:
    """Returns the examples of each task; the argument is that of `merge`, for messages.

    Raises:
        InputError: The data of a task are no arrays of as many examples, or labels are no classes.
    """
    examples = {}
    for task, of_task in data.items():
        inputs, labels = of_task, None
        if isinstance(of_task, tuple):
            if len(of_task) != 2:
                raise InputError(
                    f"{argument}: {task!r} is a tuple of {len(of_task)}, expected inputs and labels"
                )
            inputs, labels = of_task
        by_name = inputs if isinstance(inputs, Mapping) else {_ONLY: inputs}
        arrays = {
            name: _as_array(f"{argument}: {task!r}", name, array) for name, array in by_name.items()
        }
        if not arrays:
            raise InputError(f"{argument}: {task!r} has no inputs")
        try:
            examples[task] = ArrayExamples(
                arrays, _as_labels(f"{argument}: labels of {task!r}", labels)
            )
        except InputError as error:
            raise InputError(f"{argument}: {task!r}: {error}") from error
    return examples


def unwrap(inputs: Mapping[str, Any]) -> PyTree:
    """Returns inputs as the user gave them: one array, or arrays by name."""
    return inputs[_ONLY] if inputs.keys() == {_ONLY} else dict(inputs)


def require_labels_in_range(
    task: str, examples: ArrayExamples, classes: int, argument: str = "data"
) -> None:
    """Refuses labels that are none of the classes, but for those below 0, which count for nothing.

    Raises:
        InputError: Says which label is too large.
    """
    labels = examples.labels
    if labels is not None and labels.size and labels.max() >= classes:
        raise InputError(
            f"{argument}: {task!r} has the label {labels.max()}, and forward gives {classes} "
            f"logits; labels are from 0 to {classes - 1}"
        )


def _as_array(where: str, name: str, array: Any) -> np.ndarray[Any, Any]:
    if not isinstance(name, str):
        raise InputError(f"{where} has an input called {name!r}; names are texts")
    where += "" if name == _ONLY else f", input {name!r}"
    if not hasattr(array, "__array__"):
        raise InputError(
            f"{where} is {_kind(array)}, expected an array with an example a row; labels go into "
            "a tuple with it: (inputs, labels)"
        )
    values = np.asarray(array)
    is_number = jnp.issubdtype(values.dtype, jnp.number) or values.dtype == bool
    if not values.ndim or not is_number:
        raise InputError(
            f"{where} is {values.dtype} of shape {values.shape}, expected numbers [N, ...]"
        )
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        row = int(np.argwhere(~np.isfinite(values))[0][0])
        raise InputError(f"{where}: row {row} holds a number that is NaN or infinite")
    return values


def _as_labels(where: str, labels: Any) -> np.ndarray[Any, Any] | None:
    if labels is None:
        return None
    array = np.asarray(labels)
    if array.dtype.kind not in "iu" or not 1 <= array.ndim <= 2:
        raise InputError(
            f"{where} are {array.dtype} of shape {array.shape}, expected whole "
            "numbers [N], the class of each example"
        )
    return array


def _kind(value: Any) -> str:
    return f"{type(value).__name__} ({shorten(repr(value), 40)})"
