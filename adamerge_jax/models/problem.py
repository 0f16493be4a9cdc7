"""The problem that a task's head solves, which says what the outputs of the head mean."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

TOKEN_CLASSIFICATION = "AutoModelForTokenClassification"
"""The `transformers` class of models with a head on every token."""

MULTIPLE_CHOICE = "AutoModelForMultipleChoice"
"""The `transformers` class of models that choose among several texts."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """The problem that a task's head solves.

    Attributes:
        name: Its name.
        predicts: The predictions in words, for messages: `numbers`.
        objectives: The names of the objectives that have a meaning for it. Those of classes may be
            anyone's: all that no other problem has for itself have one.
        label: The labels in words: `the class index`.
        loss: The name of the objective that compares with labels.
        auto_class: The `transformers` class of such models, where that is not the one of models
            whose head gives classes of examples.
        in_place: The objectives that stand for those that presets have for classes.
    """

    name: str
    predicts: str
    objectives: tuple[str, ...]
    label: str
    loss: str = "cross_entropy"
    auto_class: str | None = None
    in_place: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)

    def has(self, objective: str) -> bool:
        """Returns True if an objective of that name has a meaning for the problem."""
        if objective in self.objectives:
            return True
        of_others = {name for problem in _OF_OTHERS for name in problem.objectives}
        return self.name == "classes" and objective not in of_others


CLASSES = Problem(
    "classes",
    "classes",
    (
        *("entropy", "logit_alignment", "hidden_state_alignment", "cross_entropy"),
        *("pseudo_labels", "expert_labels"),
    ),
    "the class index",
)
"""One of C classes for each example; also the next token of a language model."""

WORDS = Problem(
    "words",
    "a class for each word",
    ("entropy", "logit_alignment", "hidden_state_alignment", "cross_entropy"),
    "the lists of classes",
    auto_class=TOKEN_CLASSIFICATION,
)
"""One of C classes for each word of a text, read off its first token."""

NUMBERS = Problem(
    "numbers",
    "numbers",
    ("output_alignment", "squared_error", "hidden_state_alignment"),
    "the number",
    loss="squared_error",
    in_place={"logit_alignment": "output_alignment", "cross_entropy": "squared_error"},
)
"""R numbers for each example, of which most models have one: regression."""

LABELS = Problem(
    "labels",
    "any number of labels",
    ("entropy", "logit_alignment", "hidden_state_alignment", "cross_entropy"),
    "the lists of classes",
)
"""Any number of C labels for each example, which do not exclude each other.

Each label is a choice of two, so that the outputs of a head are `[B, C, 2]`: 0 and the logit.
"""


CHOICES = Problem(
    "choices",
    "one of several choices",
    ("entropy", "logit_alignment", "cross_entropy", "expert_labels"),
    "the number of the right choice",
    auto_class=MULTIPLE_CHOICE,
)
"""One of N texts for each example: the classes are the choices, `[B, N]`."""


def auto_class_of(classes: Sequence[str]) -> str | None:
    """Returns the `transformers` class that loads models of a class with a head of its own kind.

    Args:
        classes: The classes that a config.json names, `BertForTokenClassification` first.

    Returns:
        The class, `AutoModelForTokenClassification`; None for all other models.
    """
    for auto_class in filter(None, (problem.auto_class for problem in _OF_OTHERS)):
        if classes and classes[0].endswith(auto_class.removeprefix("AutoModel")):
            return auto_class
    return None


def problem_of(auto_class: str | None, config: Any) -> Problem:
    """Returns the problem that a model solves.

    As in `transformers` it follows from the config where that does not name it.

    Args:
        auto_class: The result of `auto_class_of`.
        config: The model's config.
    """
    of_class = [problem for problem in _OF_OTHERS if problem.auto_class is not None]
    for problem in of_class:
        if problem.auto_class == auto_class:
            return problem
    if config.problem_type == "multi_label_classification":
        return LABELS
    is_single = config.problem_type is None and config.num_labels == 1
    return NUMBERS if is_single or config.problem_type == "regression" else CLASSES


_OF_OTHERS = (WORDS, NUMBERS, LABELS, CHOICES)
"""The problems but that of classes."""
