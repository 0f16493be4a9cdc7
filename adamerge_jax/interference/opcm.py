"""OPCM (Tang et al., 2025): each expert apart from what the experts before it changed."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from adamerge_jax.interference.step import Step
from adamerge_jax.parameter_names import matches
from adamerge_jax.task_vectors import rounding

EMBEDDINGS = ("*embed*", "*wte*", "*wpe*", "shared.*")
"""Matrices that are no linear layers, by their usual names."""


def project_apart(threshold: float = 0.5) -> Step:
    """Projects each expert's matrices away from the sum of the experts before it.

    Experts come one after the other, in the order of the recipe. With `U S V^T`, the singular value
    decomposition of the projected task vectors' sum up to then, the next one loses its parts along
    `u_i v_i^T` for all i, and along `u_i v_j^T` where i and j are both among the r leading
    directions; r is the largest number whose singular values are at most `threshold` of the sum of
    all. Embeddings and tensors that are no matrices stay. All task vectors are then multiplied by
    one number, so that their sum is as long as the task vectors were in the mean: summed with the
    coefficient 1 they are the merge of OPCM.

    Merging Models on the Fly Without Retraining, Tang et al., NeurIPS 2025, section 4, as in the
    authors' code. The experts' order is not shuffled, and directions beyond the sum's rank, which
    may be any, are none.

    Args:
        threshold: The paper's alpha, from 0 to 1.

    Raises:
        ValueError: The threshold is not from 0 to 1.

    Examples:
        >>> import numpy as np
        >>> from adamerge_jax.interference import project_apart
        >>> values = np.array([np.diag([2.0, 0.0]), np.diag([1.0, 1.0])])  # [K, m, n]
        >>> step = project_apart()
        >>> step.apply("weight", values, 1.0).tolist()
        [[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]]
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}, expected from 0 to 1")

    def projected(name: str, values: np.ndarray) -> Float[np.ndarray, "K ..."]:
        values = np.array(values, np.float32)  # a copy, changed below
        if values.ndim != 3 or matches(name, EMBEDDINGS):
            return values
        total = values[0].copy()
        for row in values[1:]:
            row -= _inside(total, row, threshold)
            total += row
        return values

    def fit(task_vectors: Mapping[str, np.ndarray]) -> float:
        squares, merged_square = 0.0, 0.0
        for name, values in task_vectors.items():
            flat = values.reshape(len(values), -1)
            squares = squares + np.square(flat, dtype=np.float32).sum(1, dtype=np.float64)
            total = projected(name, values).sum(0)
            merged_square += float(np.square(total).sum(dtype=np.float64))
        if not merged_square:
            return 1.0
        return float(np.sqrt(squares).mean() / math.sqrt(merged_square))

    def apply(name: str, values: np.ndarray, scale: float) -> np.ndarray:
        return (projected(name, values) * np.float32(scale)).astype(values.dtype)

    def takes(scale: Any, experts: int) -> bool:
        return isinstance(scale, float) and 0 <= scale < math.inf

    return Step(apply, fit, takes)


def _inside(
    total: Float[np.ndarray, "m n"], delta: Float[np.ndarray, "m n"], threshold: float
) -> Float[np.ndarray, "m n"]:
    """Returns the part of a task vector along the directions of the sum of those before it."""
    left, sizes, right = np.linalg.svd(total, full_matrices=False)
    rank = np.count_nonzero(sizes > rounding.SINGULAR_VALUE * sizes[0])
    left, sizes, right = left[:, :rank], sizes[:rank], right[:rank]
    if not rank:
        return np.zeros_like(delta)
    leading = int(np.count_nonzero(np.cumsum(sizes) <= threshold * sizes.sum()))
    components = left.T @ delta @ right.T
    aligned = np.diag(np.diag(components))
    aligned[:leading, :leading] = components[:leading, :leading]
    return left @ aligned @ right
