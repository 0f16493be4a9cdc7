"""The interference step as a type."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


def _nothing_to_fit(task_vectors: Mapping[str, np.ndarray]) -> None:
    return None


def _no_facts(fitted: Any, experts: int) -> bool:
    return fitted is None


class Step(NamedTuple):
    """One change of task vectors.

    Attributes:
        apply: `(tensor name, values [K, *shape], fitted) -> values [K, *shape]`.
        fit: From all task vectors `[K, *shape]` by tensor name to the facts of the whole model
            that `apply` needs, as numbers and lists that JSON can hold.
        takes: `(fitted, K) -> True` where `apply` takes these facts, which may come from a file.
    """

    apply: Callable[[str, np.ndarray, Any], np.ndarray]
    fit: Callable[[Mapping[str, np.ndarray]], Any] = _nothing_to_fit
    takes: Callable[[Any, int], bool] = _no_facts
