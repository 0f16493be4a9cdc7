import logging
import re

import numpy as np
import pytest

from adamerge_jax.data.arrays import ArrayExamples
from adamerge_jax.data.class_names import align_labels, names_of_outputs
from adamerge_jax.errors import InputError


def aligned(names, labels, outputs, in_order=True):
    examples = ArrayExamples({"x": np.zeros(len(labels))}, np.array(labels, np.int32))
    examples.class_names, examples.names_have_order = names, in_order
    align_labels(examples, outputs, "test data of task 'x'", outputs_of="the expert")
    return examples.labels.tolist()


@pytest.mark.parametrize(
    ("names", "labels", "outputs", "expected", "said"),
    [
        (["cat", "dog"], [0, 1, 1], ["cat", "dog"], [0, 1, 1], None),
        (["cat", "dog", "owl"], [0, 1, 2], ["dog", "owl", "cat"], [2, 0, 1], "matched by name"),
        (["big cat", "Dog "], [0, 1], ["dog", "BIG_cat"], [1, 0], "matched by name"),
        # No examples of some classes: the place in a list of folders is another then.
        (
            ["cat", "owl"],
            [0, 1],
            ["cat", "dog", "owl"],
            [0, 2],
            "has no class dog, which",
        ),
        # Names that tell nothing: the order counts.
        (["cat", "dog"], [0, 1], ["LABEL_0", "LABEL_1"], [0, 1], None),
        (["cat", "dog"], [0, 1], ["0", "1"], [0, 1], None),
        (["0", "1"], [0, 1], ["cat", "dog"], [0, 1], None),
        (["0", "1", "10"], [0, 1, 2], ["LABEL_0", "LABEL_1", "LABEL_2"], [0, 1, 2], None),
        # Numbers as names on both sides are names.
        (["1", "10", "2"], [0, 1, 2], ["1", "2", "10"], [0, 2, 1], "matched by name"),
        (["LABEL_1", "LABEL_0"], [0, 1], ["LABEL_0", "LABEL_1"], [1, 0], "matched by name"),
        # Other names, in places that do not contradict each other.
        (["neg", "pos"], [0, 1], ["negative", "positive"], [0, 1], "'neg' is taken for 'negative'"),
        (["a", "neutral"], [0, 1], ["b", "neutral"], [0, 1], "'a' is taken for 'b', class 0"),
        # A class that no example has.
        (["cat", "dog", "owl"], [0, 1], ["dog", "cat"], [1, 0], "'owl' is none of .* no example"),
        # Two classes that differ in case only.
        (["a", "A"], [0, 1], ["A", "a"], [0, 1], None),
    ],
)
def test_labels_by_name(names, labels, outputs, expected, said, caplog):
    with caplog.at_level(logging.WARNING):
        assert aligned(names, labels, outputs) == expected
    if said is None:
        assert not caplog.messages
    else:
        assert len(caplog.messages) == 1
        assert re.search(said, caplog.messages[0])


@pytest.mark.parametrize(
    ("names", "outputs", "in_order"),
    [
        (["cat", "dog", "owl"], ["dog", "cat", "crow"], True),
        (["cat", "dog", "owl"], ["negative", "positive"], True),
        # Texts in a column have no order.
        (["cat", "dog", "owl"], ["LABEL_0", "LABEL_1", "LABEL_2"], False),
        (["cat", "dog", "owl"], ["a", "b", "c"], False),
    ],
)
def test_examples_of_a_class_that_is_not_there(names, outputs, in_order):
    with pytest.raises(InputError, match=r"examples of class '(owl|cat)', which is none of the"):
        aligned(names, [0, 1, 2], outputs, in_order)


def test_the_order_of_outputs():
    assert names_of_outputs({10: "k", 2: "c", 0: "a"}) == ["a", "c", "k"]
    assert names_of_outputs(None) == []
