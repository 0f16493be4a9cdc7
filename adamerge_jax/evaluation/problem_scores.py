"""The scores of models with heads, by the problem that a head solves."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from adamerge_jax.data.examples import Examples
from adamerge_jax.evaluation.entity_scores import OUTSIDE, entities_of, tells_entities
from adamerge_jax.evaluation.number_scores import number_measures
from adamerge_jax.models.problem import CHOICES, CLASSES, LABELS, NUMBERS, WORDS, Problem
from adamerge_jax.objectives import NOT_PREDICTED
from adamerge_jax.runs.rows import ExampleScores, Measures, Metric

log = logging.getLogger(__name__)

Batches = Iterable[tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n ..."]]]
"""The indices of n examples, and the outputs of a head for them; together all examples."""


class Scorer(NamedTuple):
    """The scores of one task.

    Attributes:
        metrics: The metrics, that of the row first.
        measure: The function from the outputs for labelled examples to their scores.
        class_names: The names of classes that the scores depend on; of most scores none.
    """

    metrics: tuple[Metric, ...]
    measure: Callable[[Batches, Examples, str], Measures]
    class_names: tuple[str, ...] = ()


def scorer_of(
    problem: Problem, class_names: Sequence[str] = (), scored: Sequence[Examples] = ()
) -> Scorer:
    """Returns the scores of a task.

    Words are scored by entities where their classes are those of such a scheme, and all data that
    are scored have entities.

    Args:
        problem: The problem that its head solves.
        class_names: The names of its classes.
        scored: The labelled data.
    """
    if problem != WORDS:
        return _SCORERS[problem.name]
    outside = class_names.index(OUTSIDE) if tells_entities(class_names) else None
    has_entities = [np.any((data.labels != outside) & (data.labels >= 0)) for data in scored]
    if outside is None or not all(has_entities):
        return Scorer(("word_accuracy",), _word_accuracy)

    def measure(batches: Batches, examples: Examples, task: str) -> Measures:
        return _entity_scores(batches, examples, task, class_names)

    return Scorer(("entity_f1", "word_accuracy"), measure, tuple(class_names))


def _accuracy(batches: Batches, examples: Examples, task: str) -> Measures:
    """Returns 1 for each example with the right class, and 0 for others."""
    predicted = np.full(len(examples), _NO_CLASS)
    for index, logits in batches:
        predicted[index] = _likeliest(logits)
    missing = (predicted == _NO_CLASS).sum()
    _warn_of_missing(missing, f"{len(predicted)} examples", task)
    is_right = (predicted == examples.labels).astype(np.float32)
    counts = np.ones(len(examples), np.int32)
    return {"accuracy": ExampleScores(is_right, counts, predicted.astype(np.int32))}


def _accuracy_of_choices(batches: Batches, examples: Examples, task: str) -> Measures:
    """Returns 1 for each example with the right choice, and 0 for others; no class has a name."""
    scores = _accuracy(batches, examples, task)["accuracy"]
    return {"accuracy": scores._replace(classes=None)}


def _label_scores(batches: Batches, examples: Examples, task: str) -> Measures:
    """Returns the F1 scores of labels that do not exclude each other: over all, and by class.

    `micro_f1` is `2 hits / (labels of the data + labels of the model)` over all classes, `macro_f1`
    the mean of the same of each class that occurs in the data. The latter is no mean over examples:
    each value is the score plus the example's influence on it, as in `number_scores.py`.
    """
    labels = np.asarray(examples.labels)
    given = np.zeros(labels.shape, bool)
    missing = 0
    for index, logits in batches:
        given[index] = logits.argmax(-1)
        is_missing = np.isnan(logits).any(-1)
        given[index] &= ~is_missing
        missing += int(is_missing.any(-1).sum())
    _warn_of_missing(missing, f"{len(labels)} examples", task)
    hits, sizes = 2.0 * (given & (labels == 1)), (given.astype(int) + labels)
    occurs = labels.any(0)
    of_class = hits[:, occurs].sum(0) / sizes[:, occurs].sum(0)
    influence = (hits[:, occurs] - of_class * sizes[:, occurs]) / sizes[:, occurs].mean(0)
    return {
        "micro_f1": ExampleScores(hits.sum(1), sizes.sum(1)),
        "macro_f1": ExampleScores(
            of_class.mean() + influence.mean(1), np.ones(len(labels), np.int32)
        ),
    }


def _number_scores(batches: Batches, examples: Examples, task: str) -> Measures:
    """Returns the correlations with the labels, and the part of their variance explained."""
    labels = np.asarray(examples.labels)
    predicted = np.zeros(labels.shape)
    for index, numbers in batches:
        predicted[index] = numbers
    return number_measures(predicted, labels)


_SCORERS = {
    CLASSES.name: Scorer(("accuracy",), _accuracy),
    CHOICES.name: Scorer(("accuracy",), _accuracy_of_choices),
    LABELS.name: Scorer(("micro_f1", "macro_f1"), _label_scores),
    NUMBERS.name: Scorer(("pearson", "spearman", "r2"), _number_scores),
}


def _word_accuracy(batches: Batches, examples: Examples, task: str) -> Measures:
    """Returns the number of words with the right class, of those that count."""
    right = np.zeros(len(examples), np.float32)
    counts = np.zeros(len(examples), np.int32)
    for example, predicted, labels in _words(batches, examples, task):
        right[example], counts[example] = (predicted == labels).sum(), len(labels)
    return {"word_accuracy": ExampleScores(right, counts)}


def _entity_scores(
    batches: Batches, examples: Examples, task: str, class_names: Sequence[str]
) -> Measures:
    """Returns the F1 score of entities, and the accuracy of words.

    F1 is `2 hits / (entities of the labels + entities of the model)` over all examples.
    """
    hits, entities, right, counts = np.zeros((4, len(examples)), np.int32)
    names = dict(enumerate(class_names))  # a model may have more classes, and NaN are none
    for example, predicted, labels in _words(batches, examples, task):
        wanted, given = (
            entities_of([names.get(tag, OUTSIDE) for tag in tags.tolist()])
            for tags in (labels, predicted)
        )
        hits[example], entities[example] = len(wanted & given), len(wanted) + len(given)
        right[example], counts[example] = (predicted == labels).sum(), len(labels)
    return {
        "entity_f1": ExampleScores(2 * hits.astype(np.float32), entities),
        "word_accuracy": ExampleScores(right.astype(np.float32), counts),
    }


def _words(
    batches: Batches, examples: Examples, task: str
) -> Iterable[tuple[int, Int[np.ndarray, " W"], Int[np.ndarray, " W"]]]:
    """Yields each example, with the classes predicted for its words and those of the labels."""
    missing, total = 0, 0
    for index, logits in batches:
        labels = examples.take_labels(index, logits.shape[1])
        assert labels is not None  # test and validation data have some
        predicted = _likeliest(logits)
        for row, example in enumerate(index):
            counted = labels[row] != NOT_PREDICTED
            missing += int((predicted[row, counted] == _NO_CLASS).sum())
            total += int(counted.sum())
            yield int(example), predicted[row, counted], labels[row, counted]
    _warn_of_missing(missing, f"{total} words", task)


_NO_CLASS = -1
"""The class of outputs that are NaN, whose likeliest would be class 0 to NumPy."""


def _likeliest(logits: Float[np.ndarray, "... C"]) -> Int[np.ndarray, "..."]:
    return np.where(np.isnan(logits).any(-1), _NO_CLASS, logits.argmax(-1))


def _warn_of_missing(missing: int, among: str, task: str) -> None:
    if missing:
        log.warning(
            f"task {task!r}: the logits of {missing} of {among} are NaN; they count as wrong"
        )
