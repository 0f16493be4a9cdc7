"""FeatCal (Gu et al., 2026): a merge whose layers are fitted to the experts' features, in order."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy
from jaxtyping import Array, Float

from adamerge_jax.methods.experts import expert_parameters, one_hot, set_tensor, tensor_with
from adamerge_jax.methods.least_squares import linear_layers
from adamerge_jax.methods.method import MergeMethod
from adamerge_jax.methods.task_arithmetic import task_arithmetic
from adamerge_jax.mixing import materialize_compiled
from adamerge_jax.statistics import Moments, NormMoments, Statistics
from adamerge_jax.task_vectors import Delta

SMALLEST = 1e-8
"""The smallest norm and determinant, and what is added to diagonals, as in the authors' code."""


def featcal(
    coefficient: float = 0.3,
    ridge: float = 0.05,
    anchor: float = 2.0,
    interpolation: float = 0.3,
) -> MergeMethod:
    """Returns task arithmetic, calibrated layer by layer so that its features are the experts'.

    In layer l, `X_k` are the inputs on task k's data in the merge whose layers before l are
    calibrated, and `Y_k = interpolation * E_k + (1 - interpolation) * X_k` with `E_k` those in
    expert k. With `s_k = 1 / norm(X_k^T X_k)`, where products are divided by the number of rows,

        W = (sum_k s_k W_k Y_k^T X_k + ridge * A) (sum_k s_k X_k^T X_k + ridge * I)^-1

    and `A = anchor * W_start + (1 - anchor) * W_base`. Biases, and weights and biases of layer
    normalisations in stacked layers, have the same fit. Only parameters that experts changed are
    fitted; all others are task arithmetic's.

    Each layer is two forward passes for each expert. Held are the merge, one expert, and the
    moments of one layer.

    Args:
        coefficient: The coefficient of task arithmetic, the start.
        ridge: The weight of the distance to the anchor.
        anchor: The point on the line from the base (0) through the start (1).
        interpolation: The part of the expert's features in the target.

    Source: Gu et al., "FeatCal: Feature Calibration for Post-Merging Models", 2026; section 4 and
    appendix G, and the authors' code, which this repeats. That code gives tokens behind the first a
    weight of 0.01 in CLIP's last layer; here all count alike.

    Raises:
        ValueError: An option is out of its range.
    """
    for option, value, largest in (
        ("coefficient", abs(coefficient), 1e6),
        ("ridge", ridge, 1e6),
        ("anchor", anchor, 1e6),
        ("interpolation", interpolation, 1),
    ):
        if not 0 <= value <= largest:
            raise ValueError(f"{option} is {value}, expected from 0 to {largest:g}")

    def merge(
        base: Mapping[str, Array],
        deltas: Mapping[str, Delta],
        experts: int,
        statistics: Statistics,
    ) -> dict[str, Array]:
        start = task_arithmetic(coefficient).merge(base, deltas, experts)
        merged = {**base, **materialize_compiled(start)}
        start_weights = np.full(experts, coefficient, np.float32)

        def wide(name: str, number: int | None, weights: Float[np.ndarray, " K"]) -> np.ndarray:
            return np.asarray(tensor_with(base, deltas, name, number, weights), np.float64)

        def anchor_of(name: str, number: int | None) -> np.ndarray:
            from_base = wide(name, number, 0 * start_weights)
            return anchor * wide(name, number, start_weights) + (1 - anchor) * from_base

        layers = linear_layers(statistics, base, deltas)
        statistics.announce(len(layers) * experts)
        for layer in layers:
            number = layer.number
            linear: dict[str, _LinearFit] = defaultdict(_LinearFit)
            norms: dict[str, _NormFit] = defaultdict(_NormFit)
            for expert in range(experts):
                parameters = expert_parameters(base, deltas, experts, expert)
                moments = statistics.features(expert, merged, parameters, layer)
                del parameters
                for name, of_name in moments.items():
                    weight, bias = (
                        wide(place, number, one_hot(expert, experts)) if place in deltas else None
                        for place in (name, _bias_of(name))
                    )
                    if isinstance(of_name, Moments):
                        linear[name].add(of_name, interpolation, weight, bias)
                    else:
                        norms[name].add(of_name, weight, bias)
            fits: dict[str, _LinearFit | _NormFit] = {**linear, **norms}
            for name, fit in fits.items():
                places = [place for place in (name, _bias_of(name)) if place in deltas]
                anchors = [anchor_of(place, number) for place in places]
                for place, values in zip(places, fit.solve(ridge, *anchors), strict=True):
                    narrow = np.asarray(values, np.float32)
                    merged[place] = set_tensor(merged[place], number, narrow)
        return {name: merged[name] for name in deltas}

    return MergeMethod(merge, needs_data=True)


def _bias_of(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


class _LinearFit:
    """The fit of a linear layer, in float64."""

    def __init__(self) -> None:
        self._matrix: Any = 0.0
        self._product: Any = 0.0
        self._mean: Any = 0.0
        self._target: Any = 0.0
        self._scale = 0.0

    def add(
        self,
        moments: Moments,
        interpolation: float,
        weight: Float[np.ndarray, "m n"],
        bias: Float[np.ndarray, " m"] | None,
    ) -> None:
        """Adds an expert's features and parameters."""
        own_mean, other_mean, gram, own_cross = (np.asarray(m, np.float64) for m in moments)
        cross = interpolation * own_cross + (1 - interpolation) * gram
        mean = interpolation * other_mean + (1 - interpolation) * own_mean
        scale = 1 / max(float(np.linalg.norm(gram)), SMALLEST)
        self._matrix += scale * gram
        self._product += scale * weight @ cross.T
        self._scale += scale
        if bias is not None:
            self._mean += scale * own_mean
            self._target += scale * (bias + weight @ mean)

    def solve(
        self,
        ridge: float,
        weight: Float[np.ndarray, "m n"],
        bias: Float[np.ndarray, " m"] | None = None,
    ) -> list[np.ndarray]:
        """Returns the weight, and the bias if its anchor is given, from the anchors of both."""
        matrix = self._matrix + (ridge + SMALLEST) * np.eye(len(self._matrix))
        product = self._product + ridge * weight
        fitted = scipy.linalg.solve(matrix, product.T, assume_a="pos").T
        if bias is None:
            return [fitted]
        total = self._target - fitted @ self._mean + ridge * bias
        return [fitted, total / (self._scale + ridge)]


class _NormFit:
    """The fit of a layer normalisation's weight and bias, in float64."""

    def __init__(self) -> None:
        self._energy: Any = 0.0
        self._mean: Any = 0.0
        self._weight: Any = 0.0
        self._bias: Any = 0.0
        self._experts = 0

    def add(
        self,
        moments: NormMoments,
        weight: Float[np.ndarray, " n"],
        bias: Float[np.ndarray, " n"] | None,
    ) -> None:
        """Adds an expert's features and parameters; without a bias, the weight is fitted alone."""
        mean, energy = (np.asarray(moment, np.float64) for moment in moments)
        self._energy += energy
        self._mean += mean
        self._experts += 1
        self._weight += energy * weight
        if bias is not None:
            self._weight += mean * bias
            self._bias += mean * weight + bias

    def solve(
        self,
        ridge: float,
        weight: Float[np.ndarray, " n"],
        bias: Float[np.ndarray, " n"] | None = None,
    ) -> list[np.ndarray]:
        """Returns the weight, and the bias if its anchor is given, from the anchors of both."""
        energy, of_weight = self._energy + ridge, self._weight + ridge * weight
        if bias is None:
            return [of_weight / np.maximum(energy, SMALLEST)]
        count, of_bias = self._experts + ridge, self._bias + ridge * bias
        determinant = np.maximum(energy * count - self._mean**2, SMALLEST)
        return [
            (count * of_weight - self._mean * of_bias) / determinant,
            (energy * of_bias - self._mean * of_weight) / determinant,
        ]
