"""Heads fitted to an expert's logits on the features of the merged model, after learning.

The fit is convex: the mean KL divergence of the expert's classes from the head's, plus the squared
distance to the expert's own head, whose strength cross-validation chooses. SyMerge (Jung et al.,
2025) and Kong et al. ("Fine-tuning Aligned Classifiers for Merging Outputs", 2024) find that most
of what a merge loses is between its features and the experts' heads.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import scipy
from jaxtyping import Float, Int
from threadpoolctl import threadpool_limits

from adamerge_jax.heads.losses import OF_CLASSES, HeadLoss
from adamerge_jax.walk import lowest_nearby

STRENGTHS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""The strengths of the distance among which cross-validation chooses; it begins in the middle and
walks to better neighbours."""

FOLDS = 5
"""The number of parts of the examples, each of which judges a fit to the others."""

MOST_ITERATIONS = 100
"""The largest number of iterations of one fit."""

FEWEST_TO_SHARE = 10**8
"""The multiplications of one product from which several threads compute it."""

Kind = Literal["scaled", "refitted"]
"""scaled: a scale and a bias for each class; refitted: the whole linear layer."""


class HeadFit(NamedTuple):
    """A linear head that was fitted.

    Attributes:
        weight: `[C, H]`.
        bias: `[C]`; zeros for a head without one.
        strength: The strength of the distance to the expert's head; infinite where the expert's
            own head did best, which then is the result.
        kl: The mean KL divergence on examples that the head was not fitted to, in nats; the mean
            loss where another takes its place.
        kl_before: That of the expert's own head.
    """

    weight: Float[np.ndarray, "C H"]
    bias: Float[np.ndarray, " C"]
    strength: float
    kl: float
    kl_before: float


class _Layer(NamedTuple):
    """An affine layer: `inputs @ factor.T + bias`, or `inputs * factor + bias` for a vector.

    A layer without a bias has none that is fitted: it stays 0.
    """

    factor: Float[np.ndarray, "C ..."]
    bias: Float[np.ndarray, " C"]
    has_bias: bool

    def logits(self, inputs: Float[np.ndarray, "N n"]) -> Float[np.ndarray, "N C"]:
        product = inputs @ self.factor.T if self.factor.ndim == 2 else inputs * self.factor
        return product + self.bias


def fit_head(
    features: Float[np.ndarray, "N H"],
    expert_logits: Float[np.ndarray, "N C"],
    weight: Float[np.ndarray, "C H"],
    bias: Float[np.ndarray, " C"] | None,
    *,
    kind: Kind,
    seed: int,
    groups: Int[np.ndarray, " N"] | None = None,
    loss: HeadLoss = OF_CLASSES,
) -> HeadFit:
    """Fits a head to an expert's logits.

    Minimises, in float64,

        mean_n KL(softmax(t_n) || softmax(W x_n + b)) + strength / 2 (s |W - W_0|^2 + |b - b_0|^2)

    where `x_n` are the features, `t_n` the expert's logits, `W_0` and `b_0` its head, and `s` the
    mean square of a feature, so that the strength does not depend on the size of features. `scaled`
    fits `diag(a) (W_0 x_n + b_0) + c` instead, with the distance of `a` to 1 and of `c` to 0. For
    heads that give other things than one of several classes another loss takes the place of KL.

    Args:
        features: The inputs of the head in the merged model.
        expert_logits: The expert's logits on the same examples.
        weight: The weight of the expert's head.
        bias: Its bias; None for a head without one, in which only the weight is fitted.
        kind: What is fitted.
        seed: The seed that parts the examples for cross-validation.
        groups: The group of each example, such as the text of a word: cross-validation does not
            part groups. None where each example is for itself.
        loss: The loss of the head's outputs.

    Returns:
        The head with the strength that does best in cross-validation; the expert's own where none
        does better than that, or where there are too few examples to judge.
    """
    has_bias = bias is not None
    features, targets, weight, bias = (
        np.asarray(array, np.float64)
        for array in (features, expert_logits, weight, bias if has_bias else np.zeros(len(weight)))
    )
    expert = _Layer(weight, bias, has_bias)
    if kind == "scaled":
        inputs = expert.logits(features)
        start = _Layer(np.ones(len(bias)), np.zeros(len(bias)), has_bias)
    else:
        inputs, start = features, expert
    kl_before = loss.excess(start.logits(inputs), targets)
    distinct = np.arange(len(inputs)) if groups is None else np.unique(groups)
    folds = min(FOLDS, len(distinct) // 2)
    if folds < 2:
        return HeadFit(weight, bias, float("inf"), kl_before, kl_before)
    parts = np.array_split(np.random.default_rng([seed, 5]).permutation(len(distinct)), folds)
    if groups is not None:
        parts = [np.flatnonzero(np.isin(groups, distinct[part])) for part in parts]
    # The products of most heads are too small to share among threads, which wait for each other.
    threads = 1 if inputs.size * len(bias) < FEWEST_TO_SHARE else None
    with threadpool_limits(threads, "blas"):
        strength, kl = _best_strength(inputs, targets, start, parts, loss)
        if not kl < kl_before:
            return HeadFit(weight, bias, float("inf"), kl_before, kl_before)
        fitted = _fit(inputs, targets, start, start, strength, loss)
    if kind == "scaled":
        scale, shift, _ = fitted
        weight, bias = scale[:, None] * weight, scale * bias + shift
    else:
        weight, bias, _ = fitted
    return HeadFit(weight, bias, strength, kl, kl_before)


def _best_strength(
    inputs: Float[np.ndarray, "N n"],
    targets: Float[np.ndarray, "N C"],
    start: _Layer,
    parts: Sequence[np.ndarray],
    loss: HeadLoss,
) -> tuple[float, float]:
    """Returns the strength that does best on the parts left out, and its mean loss there."""
    remaining = [np.setdiff1d(np.arange(len(inputs)), part) for part in parts]
    layers = [start] * len(parts)

    def divergence(strength: float) -> float:
        total = 0.0
        for position, (part, others) in enumerate(zip(parts, remaining, strict=True)):
            # A neighbour begins where the last strength ended.
            layer = _fit(inputs[others], targets[others], start, layers[position], strength, loss)
            layers[position] = layer
            total += loss.excess(layer.logits(inputs[part]), targets[part]) * len(part)
        return total / len(inputs)

    return lowest_nearby(divergence, STRENGTHS, first=STRENGTHS[len(STRENGTHS) // 2])


def _fit(
    inputs: Float[np.ndarray, "N n"],
    targets: Float[np.ndarray, "N C"],
    anchor: _Layer,
    first: _Layer,
    strength: float,
    loss: HeadLoss,
) -> _Layer:
    """Minimises the objective of `fit_head` for one strength, from a first guess."""
    wanted = loss.wanted(targets)
    size = max(float(np.square(inputs).mean()), np.finfo(float).tiny)
    cut = anchor.factor.size

    def layer_of(flat: np.ndarray) -> _Layer:
        bias = flat[cut:] if anchor.has_bias else anchor.bias
        return _Layer(flat[:cut].reshape(anchor.factor.shape), bias, anchor.has_bias)

    def flat_of(factor: np.ndarray, bias: np.ndarray) -> np.ndarray:
        return np.concatenate([factor.ravel(), bias if anchor.has_bias else bias[:0]])

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        layer = layer_of(flat)
        total, slope = loss.value(layer.logits(inputs), wanted)
        residual = slope / len(inputs)
        moved, shifted = layer.factor - anchor.factor, layer.bias - anchor.bias
        distance = size * np.square(moved).sum() + np.square(shifted).sum()
        product = residual.T @ inputs if moved.ndim == 2 else (residual * inputs).sum(0)
        gradient = flat_of(product + strength * size * moved, residual.sum(0) + strength * shifted)
        return total / len(inputs) + strength / 2 * distance, gradient

    flat = flat_of(first.factor, first.bias)
    options = {"maxiter": MOST_ITERATIONS}
    return layer_of(
        scipy.optimize.minimize(objective, flat, jac=True, method="L-BFGS-B", options=options).x
    )
