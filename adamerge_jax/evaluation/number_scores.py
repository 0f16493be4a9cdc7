"""The scores of numbers: correlations with the labels, and the part of their variance explained.

None of them is a mean over examples. Each example's value is the score plus the example's influence
on it, so that the mean is the score itself, and the mean over examples drawn with replacement
varies as the score of these does (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
chapter 21).
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from adamerge_jax.evaluation.embedding_scores import spearman
from adamerge_jax.runs.rows import ExampleScores, Measures, Metric

Numbers = Float[np.ndarray, " N"]


def number_measures(
    predicted: Float[np.ndarray, "N R"], labels: Float[np.ndarray, "N R"]
) -> Measures:
    """Computes the scores of numbers by all metrics, the mean over the R numbers of an example."""
    columns = list(zip(predicted.T.astype(np.float64), labels.T.astype(np.float64), strict=True))
    counts = np.ones(len(labels), np.int32)

    def mean(score: Callable[[Numbers, Numbers], Numbers]) -> ExampleScores:
        return ExampleScores(np.mean([score(*column) for column in columns], axis=0), counts)

    scores: dict[Metric, Callable[[Numbers, Numbers], Numbers]] = {
        "pearson": pearson,
        "spearman": lambda given, wanted: spearman(given, wanted).values,
        "r2": r_squared,
    }
    return {metric: mean(score) for metric, score in scores.items()}


def pearson(predicted: Numbers, labels: Numbers) -> Numbers:
    """Returns Pearson's correlation, with each example's influence on it.

    With both sides of mean 0 and spread 1 the influence is `x y - r (x^2 + y^2) / 2`.
    """
    if not np.isfinite(predicted).all() or np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return np.full(len(labels), np.nan)
    first, second = ((side - side.mean()) / side.std() for side in (predicted, labels))
    correlation = (first * second).mean()
    return correlation + first * second - correlation * (first**2 + second**2) / 2


def r_squared(predicted: Numbers, labels: Numbers) -> Numbers:
    """Returns `1 - mean squared error / variance of the labels`, with each example's influence."""
    errors, deviations = np.square(predicted - labels), np.square(labels - labels.mean())
    if not np.isfinite(errors).all() or not deviations.any():
        return np.full(len(labels), np.nan)
    share = errors.mean() / deviations.mean()
    return 1 - share - (errors - share * deviations) / deviations.mean()
