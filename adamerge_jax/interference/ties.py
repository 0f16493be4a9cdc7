"""TIES (Yadav et al., NeurIPS 2023): trim, elect a sign, merge the entries that agree with it.

AdaMerging++ learns coefficients for task vectors after the first two steps.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from adamerge_jax.interference.step import Step


def trim(density: float = 0.2) -> Step:
    """Keeps the largest entries of each expert's task vector and sets the others to 0.

    The first step of TIES (Yadav et al., NeurIPS 2023). Of the D entries of the whole model the
    `density * D` largest stay and, as in the authors' code, the next one.

    Args:
        density: Part of the entries to keep, over 0 and up to 1.

    Raises:
        ValueError: The density is not over 0 and up to 1.

    Examples:
        >>> import numpy as np
        >>> from adamerge_jax.interference import trim
        >>> values = np.array([[4.0, -1.0, 2.0, 3.0]])  # [K, *shape], one expert
        >>> step = trim(density=0.5)
        >>> step.apply("weight", values, step.fit({"weight": values})).tolist()
        [[4.0, 0.0, 2.0, 3.0]]
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}, expected over 0 and up to 1")

    def fit(task_vectors: Mapping[str, np.ndarray]) -> list[float]:
        thresholds = []
        for expert in range(len(next(iter(task_vectors.values())))):
            magnitudes = np.concatenate(
                [
                    np.abs(values[expert], dtype=np.float32).ravel()
                    for values in task_vectors.values()
                ]
            )
            dropped = magnitudes.size - int(magnitudes.size * density)
            # As the authors' code counts: the threshold is the largest of the entries beyond.
            kth = max(dropped - 1, 0)
            thresholds.append(float(np.partition(magnitudes, kth)[kth]))
        return thresholds

    def apply(name: str, values: np.ndarray, thresholds: list[float]) -> np.ndarray:
        limits = np.asarray(thresholds, np.float32).reshape(-1, *(1 for _ in values.shape[1:]))
        return np.where(np.abs(values) >= limits, values, 0)

    def takes(thresholds: Any, experts: int) -> bool:
        is_list = isinstance(thresholds, list) and len(thresholds) == experts
        return is_list and all(isinstance(t, float) and 0 <= t < math.inf for t in thresholds)

    return Step(apply, fit, takes)


def elect_sign() -> Step:
    """Sets entries to 0 that disagree in sign with the sum over experts.

    The second step of TIES (Yadav et al., NeurIPS 2023).

    Examples:
        >>> import numpy as np
        >>> from adamerge_jax.interference import elect_sign
        >>> elect_sign().apply("weight", np.array([[4.0, -1.0], [-3.0, -2.0]]), None).tolist()
        [[4.0, -1.0], [0.0, -2.0]]
    """

    def apply(name: str, values: np.ndarray, fitted: None) -> np.ndarray:
        elected = np.sign(values.sum(0, dtype=np.float32))
        return np.where(np.sign(values) == elected, values, 0)

    return Step(apply)


def disjoint_mean() -> Step:
    """Divides each entry by the number of experts that have one there.

    Summed with one coefficient, the result is that coefficient times the mean over those experts:
    the merge of TIES (Yadav et al., NeurIPS 2023).

    Examples:
        >>> import numpy as np
        >>> from adamerge_jax.interference import disjoint_mean
        >>> disjoint_mean().apply("weight", np.array([[4.0, -1.0], [0.0, -2.0]]), None).tolist()
        [[4.0, -0.5], [0.0, -1.0]]
    """

    def apply(name: str, values: np.ndarray, fitted: None) -> np.ndarray:
        count = np.count_nonzero(values, axis=0)
        return values / np.maximum(count, 1).astype(values.dtype)

    return Step(apply)
