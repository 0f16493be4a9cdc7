"""The scores of sentence embedders on pairs of texts: rank correlation, and retrieval."""

from collections.abc import Mapping

import numpy as np
import scipy
from jaxtyping import Float

from adamerge_jax.data.examples import Examples
from adamerge_jax.errors import InputError
from adamerge_jax.models.embedding_form import Similarity
from adamerge_jax.runs.rows import ExampleScores, Measures, Metric

RECALLS: Mapping[Metric, int] = {"recall_at_1": 1, "recall_at_10": 10}
"""The metrics of retrieval, and the number of texts that are retrieved."""

_ROUNDING = 1e-6
"""The difference of similarities, as a part of them, under which two texts are equally near."""

_AT_ONCE = 2**24
"""The number of similarities that are in memory at once."""


def embedding_metric(examples: Examples) -> Metric:
    """Returns the first metric of a task's examples: that of scores, or of retrieval."""
    return "recall_at_1" if examples.scores is None else "spearman"


def require_pairs(examples: Mapping[str, Examples], part: str) -> None:
    """Refuses data of a table that are no pairs, or of which only some have scores.

    Args:
        examples: The examples by task.
        part: The part of the data, for messages.

    Raises:
        InputError: Names the task and the field.
    """
    scored = [task for task, data in examples.items() if data.scores is not None]
    for task, data in examples.items():
        if data.texts != 2:
            raise InputError(
                f"tasks.{task}.{part}.text: is one column; sentence embedders are scored on pairs: "
                "give the columns of both texts"
            )
        if scored and data.scores is None:
            raise InputError(
                f"tasks.{task}.{part}.label: is missing while {scored[0]} has scores of its pairs; "
                "give it for every task, or for none: then each second text is what is to be found"
            )
        if data.scores is not None and np.ptp(data.scores) == 0:
            raise InputError(
                f"tasks.{task}.{part}.label: all scores are {data.scores[0]:g}, with which nothing "
                "correlates; leave it out if each second text is what is to be found"
            )


def embedding_measures(
    embeddings: Float[np.ndarray, "N 2 H"], examples: Examples, similarity: Similarity
) -> Measures:
    """Computes the scores of a model's embeddings of pairs by all metrics.

    Args:
        embeddings: The embeddings of both texts.
        examples: The pairs.
        similarity: The similarity of embeddings.
    """
    first, second = np.moveaxis(embeddings.astype(np.float64), 1, 0)
    if similarity == "cosine":
        first, second = (_of_length_one(side) for side in (first, second))
    if examples.scores is not None:
        similarities = np.einsum("nh,nh->n", first, second)
        return {"spearman": spearman(similarities, examples.scores)}
    ranks = _ranks_of_partners(first, second)
    counts = np.ones(len(ranks), np.int32)
    return {
        metric: ExampleScores((ranks < count).astype(np.float32), counts)
        for metric, count in RECALLS.items()
    }


def spearman(
    similarities: Float[np.ndarray, " N"], scores: Float[np.ndarray, " N"]
) -> ExampleScores:
    """Computes Spearman's rank correlation, ties with their mean rank.

    Each example's value is the correlation plus the example's influence on it, so that the mean is
    the correlation itself, and the mean over examples drawn with replacement varies as the
    correlation of these does (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter
    21; the influence of a rank is that of all examples that it is counted from).

    Args:
        similarities: The similarity of each pair.
        scores: Its score in the data.
    """
    counts = np.ones(len(scores), np.int32)
    if not np.isfinite(similarities).all() or np.ptp(similarities) == 0 or np.ptp(scores) == 0:
        return ExampleScores(np.full(len(scores), np.nan), counts)
    first, second = (
        (scipy.stats.rankdata(side) - 0.5) / len(side) for side in (similarities, scores)
    )
    centred_first, centred_second = first - 0.5, second - 0.5
    deviation_first, deviation_second = centred_first.std(), centred_second.std()
    scale = deviation_first * deviation_second
    correlation = (centred_first * centred_second).mean() / scale
    influence = centred_first * centred_second
    influence += _mean_of_higher(similarities, centred_second)
    influence += _mean_of_higher(scores, centred_first)
    influence = (influence - influence.mean()) / scale
    for side, deviation in ((similarities, deviation_first), (scores, deviation_second)):
        influence -= correlation / 2 * _influence_on_variance(side) / deviation**2
    return ExampleScores(correlation + influence, counts)


def _mean_of_higher(
    values: Float[np.ndarray, " N"], summed: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """Returns the sum over the examples of higher value, and half of those of the same, over N."""
    _, group = np.unique(values, return_inverse=True)
    of_group = np.bincount(group, summed)
    above = of_group.sum() - np.cumsum(of_group)
    return (above + of_group / 2)[group] / len(values)


def _influence_on_variance(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Returns each example's influence on the variance of ranks, which ties make smaller."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    parts = sizes / len(values)
    return ((parts**3).sum() - parts[group] ** 2) / 4


def _ranks_of_partners(
    first: Float[np.ndarray, "N H"], second: Float[np.ndarray, "N H"]
) -> Float[np.ndarray, " N"]:
    """Returns the number of second texts that are nearer to each first text than its own."""
    ranks = np.empty(len(first))
    step = max(1, _AT_ONCE // len(first))
    for start in range(0, len(first), step):
        similarities = first[start : start + step] @ second.T
        partner = np.einsum("nh,nh->n", first[start : start + step], second[start : start + step])
        limit = partner + _ROUNDING * np.maximum(1, np.abs(partner))
        ranks[start : start + step] = (similarities > limit[:, None]).sum(-1)
    ranks[~np.isfinite(first).all(-1) | ~np.isfinite(second).all(-1)] = np.inf
    return ranks


def _of_length_one(embeddings: Float[np.ndarray, "N H"]) -> Float[np.ndarray, "N H"]:
    lengths = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    return embeddings / np.where(lengths > 0, lengths, 1)
