"""Columns of numbers, and of lists of labels."""

import numpy as np
import pytest

from adamerge_jax.data.arrays import ArrayExamples, read_arrays
from adamerge_jax.data.class_names import align_labels
from adamerge_jax.data.examples import Subset
from adamerge_jax.data.labels import LabelColumn, give_labels, labels_of, numbers_of
from adamerge_jax.errors import InputError
from adamerge_jax.models.problem import LABELS, NUMBERS
from adamerge_jax.recipes.schema import DataSource


def column(*values):
    return LabelColumn(list(values), range(len(values)), "label", "data: file")


def test_numbers():
    assert numbers_of(column(1, 2.5, "-3e1", [4]), 1).tolist() == [[1], [2.5], [-30], [4]]
    assert numbers_of(column([1, 2], [0.5, "3"]), 2).tolist() == [[1, 2], [0.5, 3]]


@pytest.mark.parametrize("value", [None, "a", True, float("nan"), 1e39, [1, 2], [], {}])
def test_no_numbers(value):
    with pytest.raises(InputError, match=r"data: file, row 1: 'label' is .*; expected a number"):
        numbers_of(column(1, value), 1)
    with pytest.raises(InputError, match="expected a list of 3 numbers"):
        numbers_of(column(value), 3)


def test_labels_by_number_by_name_and_one_by_one():
    expected = [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    for rows in (
        [[0, 2], [], [1]],
        [[2, 0, 0], [], [1]],
        [[1, 0, 1], [0, 0, 0], [0, 1, 0]],
        [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0, 1, 0]],
        [[True, False, True], [False] * 3, [False, True, False]],
    ):
        labels, names = labels_of(column(*rows), 3, None)
        assert (labels.tolist(), names) == (expected, None)
    labels, names = labels_of(column(["c", "a"], [], ["b"]), 3, None)
    assert (labels.tolist(), names) == (expected, ["a", "b", "c"])
    labels, names = labels_of(column([0, 2], [1]), 5, ["x", "y", "z"])
    assert (labels.tolist(), names) == ([[1, 0, 1], [0, 1, 0]], ["x", "y", "z"])


@pytest.mark.parametrize(
    "rows", [[[0, 3]], [[-1]], [["a", 1]], ["a"], [1], [None], [[True]], [[1.5]], [[" "]]]
)
def test_no_labels(rows):
    with pytest.raises(InputError, match=r"data: file, row 1: 'label' is .*; expected a list of"):
        labels_of(column([0], *rows), 3, None)


def test_more_names_than_the_head_has_are_refused():
    with pytest.raises(InputError, match="'label' has 4 classes, the task's head has 3"):
        labels_of(column(["a", "b"], ["c", "d"]), 3, None)


def test_labels_are_matched_by_name():
    examples = ArrayExamples({"x": np.zeros((3, 1))})
    give_labels(examples, column(["sad"], ["calm", "glad"], []), LABELS, 3)
    part = Subset(examples, np.array([1]))
    for either in (examples, part):
        align_labels(either, ["Glad", "Sad", "Calm"], "data", outputs_of="the expert")
        assert either.class_names == ["Glad", "Sad", "Calm"]
    assert examples.labels.tolist() == [[0, 1, 0], [1, 0, 1], [0, 0, 0]]
    assert part.labels.tolist() == [[1, 0, 1]]
    give_labels(examples, column(["cross"], ["glad"], []), LABELS, 3)
    with pytest.raises(InputError, match="examples of class 'cross'"):
        align_labels(examples, ["glad", "sad", "calm"], "data", outputs_of="the expert")


def test_a_subset_has_the_numbers_of_its_examples():
    examples = ArrayExamples({"x": np.zeros((3, 1))})
    give_labels(examples, column(1, 2, 3), NUMBERS, 1)
    part = Subset(examples, np.array([2, 0]))
    assert part.take_labels(np.array([1]), 0).tolist() == [[1.0]]


def test_labels_of_numpy_files(tmp_path):
    pixels, labels = np.zeros((2, 1, 4, 4), np.float32), [[1, 0, 1], [0, 0, 0]]
    np.savez(tmp_path / "data.npz", pixel_values=pixels, labels=labels, score=[0.5, 2])
    file = tmp_path / "data.npz"

    def read(label, problem, outputs):
        source = DataSource(path=str(file), label=label)
        return read_arrays(file, source, ["pixel_values"], None, "data", problem, outputs)

    assert read("labels", LABELS, 3).labels.tolist() == labels
    assert read("score", NUMBERS, 1).labels.tolist() == [[0.5], [2]]
    with pytest.raises(InputError, match=r"row 0: 'labels' is .*; expected a number"):
        read("labels", NUMBERS, 1)
