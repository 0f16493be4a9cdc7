"""Scores of sentence embedders, against SciPy and plain loops."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from adamerge_jax.data.arrays import ArrayExamples
from adamerge_jax.errors import InputError
from adamerge_jax.evaluation.embedding_scores import embedding_measures, require_pairs, spearman

GENERATOR = np.random.default_rng(0)


@pytest.mark.parametrize("levels", [None, 2, 6])
def test_spearman_and_the_influence_of_each_pair(levels: int | None) -> None:
    similarities = GENERATOR.normal(size=80)
    scores = similarities + GENERATOR.normal(size=80)
    if levels:
        scores = np.digitize(scores, np.quantile(scores, np.linspace(0, 1, levels + 1)[1:-1]))
    expected = spearmanr(similarities, scores)[0]
    result = spearman(similarities, scores)
    assert result.mean == pytest.approx(expected, abs=1e-12)
    # The jackknife leaves each pair out; of the terms of second order a part in N is left.
    without = [
        spearmanr(np.delete(similarities, pair), np.delete(scores, pair))[0] for pair in range(80)
    ]
    jackknife = 80 * expected - 79 * np.array(without)
    assert np.corrcoef(result.values, jackknife)[0, 1] > 0.999
    assert result.values.std() == pytest.approx(jackknife.std(), rel=0.03)


def test_without_an_order_there_is_no_correlation() -> None:
    assert np.isnan(spearman(np.zeros(5), np.arange(5.0)).mean)
    assert np.isnan(spearman(np.array([1, np.nan, 2, 3, 4]), np.arange(5.0)).mean)


def pairs(count: int, scores: np.ndarray | None = None) -> ArrayExamples:
    examples = ArrayExamples({"texts": np.zeros((count, 2))})
    examples.texts, examples.scores = 2, scores
    return examples


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_recall(similarity: str) -> None:
    embeddings = GENERATOR.normal(size=(30, 2, 4)).astype(np.float32)
    embeddings[:, 1] += 1.5 * embeddings[:, 0]
    embeddings[7, 1] = embeddings[3, 1]  # the same text twice: either is right
    measures = embedding_measures(embeddings, pairs(30), similarity)
    wide = embeddings.astype(np.float64)
    if similarity == "cosine":
        wide /= np.linalg.norm(wide, axis=-1, keepdims=True)
    for metric, count in (("recall_at_1", 1), ("recall_at_10", 10)):
        is_retrieved = [
            sum(query @ text > query @ partner + 1e-9 for text in wide[:, 1]) < count
            for query, partner in wide
        ]
        assert 0 < measures[metric].mean < 1 or count == 10
        np.testing.assert_array_equal(measures[metric].values, is_retrieved)


def test_a_text_without_a_number_is_not_found() -> None:
    embeddings = np.ones((3, 2, 4))
    embeddings[1, 0] = np.nan
    recall = embedding_measures(embeddings, pairs(3), "cosine")["recall_at_1"]
    assert recall.values.tolist() == [1, 0, 1]


def test_data_of_tables_are_pairs_with_scores_or_without() -> None:
    scores = np.arange(3.0)
    require_pairs({"a": pairs(3, scores), "b": pairs(3, scores)}, "test")
    require_pairs({"a": pairs(3), "b": pairs(3)}, "test")
    single = ArrayExamples({"texts": np.zeros((3, 1))})
    for examples, words in (
        ({"a": single}, "tasks.a.test.text"),
        ({"a": pairs(3, scores), "b": pairs(3)}, "tasks.b.test.label: is missing"),
        ({"a": pairs(3, np.ones(3))}, "tasks.a.test.label: all scores are 1"),
    ):
        with pytest.raises(InputError, match=words):
            require_pairs(examples, "test")
