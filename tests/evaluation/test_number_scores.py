"""Scores that are no means over examples, against SciPy; influences by leaving examples out."""

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from adamerge_jax.evaluation.number_scores import number_measures, pearson, r_squared
from adamerge_jax.evaluation.problem_scores import scorer_of
from adamerge_jax.models.problem import LABELS, NUMBERS
from adamerge_jax.runs.rows import Row
from adamerge_jax.runs.saved_rows import SavedRow
from tests.evaluation.test_entity_scores import Words

GENERATOR = np.random.default_rng(0)
N = 300
LABELLED = GENERATOR.normal(3, 2, size=(N, 2))
GIVEN = 0.8 * LABELLED + GENERATOR.normal(size=(N, 2))


def test_scores_are_the_mean_over_the_numbers():
    measures = number_measures(GIVEN, LABELLED)
    columns = list(zip(GIVEN.T, LABELLED.T, strict=True))
    for metric, score in [("pearson", pearsonr), ("spearman", spearmanr)]:
        expected = np.mean([score(*column)[0] for column in columns])
        assert measures[metric].mean == pytest.approx(expected)
    explained = 1 - np.square(GIVEN - LABELLED).mean(0) / LABELLED.var(0)
    assert measures["r2"].mean == pytest.approx(explained.mean())
    assert scorer_of(NUMBERS).metrics == tuple(measures)


def leave_one_out(score, *sides):
    """The pseudo-values of a score, which its influences come near to."""
    whole = score(*sides)
    rows = np.arange(len(sides[0]))
    without = np.array([score(*(side[rows != row] for side in sides)) for row in rows])
    return len(rows) * whole - (len(rows) - 1) * without


@pytest.mark.parametrize("score", [pearson, r_squared])
def test_influences(score):
    values = score(GIVEN[:, 0], LABELLED[:, 0])
    expected = leave_one_out(lambda *sides: score(*sides).mean(), GIVEN[:, 0], LABELLED[:, 0])
    np.testing.assert_allclose(values, expected, atol=0.1, rtol=0.05)


def test_f1_scores_of_labels():
    labels = (GENERATOR.random((N, 4)) < [0.5, 0.2, 0.1, 0]).astype(int)
    logits = GENERATOR.normal(size=(N, 4, 2))
    given = logits.argmax(-1)
    measures = scorer_of(LABELS).measure([(np.arange(N), logits)], Words(labels), "moods")

    def micro(given, labels):
        return 2 * (given & labels).sum() / (given.sum() + labels.sum())

    def macro(given, labels):
        return np.mean([micro(given[:, c], labels[:, c]) for c in range(3)])  # the last has none

    assert measures["micro_f1"].mean == pytest.approx(micro(given, labels))
    assert measures["macro_f1"].mean == pytest.approx(macro(given, labels))
    expected = leave_one_out(macro, given, labels)
    np.testing.assert_allclose(measures["macro_f1"].values, expected, atol=0.15)


@pytest.mark.parametrize("score", [pearson, r_squared])
def test_a_model_without_numbers_has_no_score(score):
    assert np.isnan(score(np.full(3, np.nan), np.arange(3.0))).all()
    assert np.isnan(score(np.arange(3.0), np.ones(3))).all()


def test_scores_near_0_are_read_as_they_were_saved():
    given = np.random.default_rng(2).normal(size=(N, 1)) * 100
    measures = dict(number_measures(given, LABELLED[:, :1]))
    first = Row.of_measures("base", {"rating": measures})
    for row in (first, *first.further):
        restored = SavedRow.of(row).restored()
        values = row.examples["rating"].values
        np.testing.assert_array_equal(restored.examples["rating"].values, values)
        assert restored.examples["rating"].mean == row.tasks["rating"]
