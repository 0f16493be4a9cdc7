"""PCB-Merging (Du et al., NeurIPS 2024): the parameters of the experts compete."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from adamerge_jax.interference.step import Step

_OUTLIERS = 1e-4
"""The part of an expert's entries that is clipped at either end, as in the authors' code."""


class _Limits(NamedTuple):
    """Facts of one expert's task vector.

    Attributes:
        low: The smallest magnitude after clipping.
        high: The largest magnitude after clipping.
        threshold: The score from which on an entry has a weight over 0.
        best: The largest score.
    """

    low: float
    high: float
    threshold: float
    best: float


def balance_competition(density: float = 0.1) -> Step:
    """Weighs each entry by its magnitude and by its agreement with the other experts' entries.

    The merge of PCB-Merging (Du et al., NeurIPS 2024, section 4). For expert k, with `n_k` the
    magnitudes of its task vector mapped to 0 to 1 over the whole model:

        score_k = exp(K n_k^2) * tanh(tau_k * sum_j tau_j)
        weight_k = (score_k - threshold_k) / (max score_k - threshold_k), at least 0
        tau_k  ->  weight_k * tau_k / sum_j weight_j

    so that the sum over experts is the merged task vector. The threshold is the score that a part
    of `density` of the expert's entries reaches. Magnitudes are clipped at their quantiles 0.0001
    and 0.9999. This is the authors' code; the paper writes softmax in place of exp and tanh and
    leaves its normalisation open.

    Args:
        density: Part of each expert's entries that stays, over 0 and up to 1.

    Raises:
        ValueError: The density is not over 0 and up to 1.

    Examples:
        >>> import numpy as np
        >>> from adamerge_jax.interference import balance_competition
        >>> values = np.array([[4.0, 1.0, 0.0, 0.5], [2.0, -3.0, 0.0, 0.5]])  # [K, *shape]
        >>> step = balance_competition(density=0.5)
        >>> step.apply("weight", values, step.fit({"weight": values})).sum(0).tolist()
        [4.0, -3.0, 0.0, 0.0]
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}, expected over 0 and up to 1")

    def fit(task_vectors: Mapping[str, np.ndarray]) -> list[list[float]]:
        experts = len(next(iter(task_vectors.values())))
        entries = sum(values[0].size for values in task_vectors.values())
        limits = []
        # One expert's entries of the whole model at a time; sorted where they lie.
        flat = np.empty(entries, np.float32)
        for expert in range(experts):
            _fill(flat, (np.abs(v[expert], dtype=np.float32) for v in task_vectors.values()))
            lowest = int(entries * _OUTLIERS)
            highest = entries - 1 - lowest
            flat.partition((lowest, highest))
            low, high = float(flat[lowest]), float(flat[highest])
            _fill(flat, (_scores(v, expert, low, high) for v in task_vectors.values()))
            threshold = min(int(entries * (1 - density)), entries - 1)
            flat.partition((threshold, entries - 1))
            limits.append([low, high, float(flat[threshold]), float(flat[-1])])
        return limits

    def apply(name: str, values: np.ndarray, fitted: list[list[float]]) -> np.ndarray:
        limits = [_Limits(*numbers) for numbers in fitted]
        total = np.zeros(values.shape[1:], np.float32)
        for expert, limit in enumerate(limits):
            total = total + _weights(values, expert, limit)
        divisor = np.where(total > 0, total, 1)
        balanced = np.empty_like(values)
        for expert, limit in enumerate(limits):
            magnitudes = np.clip(np.abs(values[expert], dtype=np.float32), limit.low, limit.high)
            share = _weights(values, expert, limit) / divisor
            balanced[expert] = np.sign(values[expert]).astype(np.float32) * magnitudes * share
        return balanced

    def takes(fitted: Any, experts: int) -> bool:
        return (
            isinstance(fitted, list)
            and len(fitted) == experts
            and all(isinstance(numbers, list) and _are_limits(numbers) for numbers in fitted)
        )

    return Step(apply, fit, takes)


def _fill(flat: np.ndarray, parts: Any) -> None:
    """Writes arrays one after the other into a flat one."""
    position = 0
    for part in parts:
        flat[position : position + part.size] = part.ravel()
        position += part.size


def _scores(values: np.ndarray, expert: int, low: float, high: float) -> np.ndarray:
    """Returns the scores of one expert's entries of a tensor, `[*shape]`, times exp(-K)."""
    agreement = np.tanh(values.sum(0, dtype=np.float32) * values[expert].astype(np.float32))
    magnitudes = np.clip(np.abs(values[expert], dtype=np.float32), low, high)
    normalized = (magnitudes - np.float32(low)) / np.float32(high - low if high > low else 1)
    # The weights are the same for any multiple of the scores, and exp(K) is too large for many
    # experts.
    return agreement * np.exp(len(values) * (np.square(normalized) - 1))


def _weights(values: np.ndarray, expert: int, limit: _Limits) -> np.ndarray:
    """Returns the weights of one expert's entries of a tensor, `[*shape]`, from 0 to 1."""
    if not limit.best > limit.threshold:
        return np.zeros(values.shape[1:], np.float32)
    scores = _scores(values, expert, limit.low, limit.high)
    above = np.clip(scores, limit.threshold, limit.best) - np.float32(limit.threshold)
    return above / np.float32(limit.best - limit.threshold)


def _are_limits(numbers: list) -> bool:
    """Returns True for numbers that `fit` may have found."""
    if len(numbers) != len(_Limits._fields):
        return False
    if not all(isinstance(number, float) and math.isfinite(number) for number in numbers):
        return False
    limit = _Limits(*numbers)
    return 0 <= limit.low <= limit.high and limit.threshold <= limit.best
