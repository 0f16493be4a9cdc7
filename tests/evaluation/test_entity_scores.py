"""Entities against the rules of CoNLL, written another way; the F1 score against its formula."""

import itertools

import numpy as np
import pytest

from adamerge_jax.data.examples import Examples
from adamerge_jax.evaluation.entity_scores import entities_of, tells_entities
from adamerge_jax.evaluation.problem_scores import scorer_of
from adamerge_jax.models.problem import WORDS
from adamerge_jax.objectives import NOT_PREDICTED
from adamerge_jax.runs.rows import Row

TAGS = ["O", "B-a", "I-a", "B-b", "I-b"]


def by_rules(tags):
    """The entities of BIO tags, by the pair of rules of conlleval: where one ends, where begins."""
    entities, start = set(), None
    for place in range(len(tags) + 1):
        here = tags[place] if place < len(tags) else "O"
        before = tags[place - 1] if place else "O"
        is_other = before[2:] != here[2:]
        if before != "O" and (here == "O" or here[0] == "B" or is_other):
            entities.add((before[2:], start, place - 1))
        if here != "O" and (here[0] == "B" or before == "O" or is_other):
            start = place
    return entities


def test_entities_of_all_short_texts():
    for tags in itertools.product(TAGS, repeat=4):
        assert entities_of(tags) == by_rules(tags), tags


def test_schemes():
    assert entities_of(["B-a", "I-a", "E-a", "S-a", "O"]) == {("a", 0, 2), ("a", 3, 3)}
    assert entities_of(["B-a", "L-a", "U-b", "I-b"]) == {("a", 0, 1), ("b", 2, 2), ("b", 3, 3)}
    assert entities_of(["", "I-a"]) == {("a", 1, 1)}
    assert tells_entities(TAGS) and tells_entities(["S-x-y", "O"])
    assert not tells_entities(["noun", "verb"]) and not tells_entities(["O"])
    assert not tells_entities(["B-a", "I-a"])  # every word would be in one


class Words(Examples):
    def __init__(self, labels):
        self.labels = np.array(labels)

    def __len__(self):
        return len(self.labels)

    def take(self, index, length):
        raise NotImplementedError

    def take_labels(self, index, length):
        return self.labels[index]


def test_f1_is_that_of_all_entities_and_words_without_a_label_do_not_count(caplog):
    labels = np.array([[1, 2, 0, NOT_PREDICTED], [3, 0, 1, 2], [0, 0, 0, 0]])
    given = np.array([[1, 2, 0, 3], [3, 4, 1, 2], [1, 0, 0, 0]])
    logits = np.eye(5)[given]
    logits[2, 3] = np.nan
    examples = Words(labels)
    scorer = scorer_of(WORDS, TAGS, [examples])
    measures = scorer.measure(
        [(np.array([0, 1]), logits[:2]), (np.array([2]), logits[2:])], examples, "ner"
    )
    # Of 3 entities 2 are found, of 4 that are given.
    assert measures["entity_f1"].mean == pytest.approx(2 * 2 / (3 + 4))
    assert measures["word_accuracy"].mean == pytest.approx((3 + 3 + 2) / 11)
    assert "1 of 11 words are NaN" in caplog.text
    row = Row.of_measures("merge", {"ner": measures})
    assert (row.metric, row.further[0].metric) == ("entity_f1", "word_accuracy")


def test_classes_without_a_name_are_no_entity():
    examples = Words([[1, 2, 0]])
    logits = np.eye(5)[[[1, 2, 4]]]  # the data name three classes, the model has five
    scorer = scorer_of(WORDS, TAGS[:3], [examples])
    measures = scorer.measure([(np.array([0]), logits)], examples, "ner")
    assert measures["entity_f1"].mean == 1
    assert measures["word_accuracy"].mean == pytest.approx(2 / 3)


def test_data_without_entities_have_no_f1():
    assert scorer_of(WORDS, TAGS, [Words([[0, 0], [0, NOT_PREDICTED]])]).metrics == (
        "word_accuracy",
    )
    assert scorer_of(WORDS, ["noun", "verb"]).metrics == ("word_accuracy",)
