"""Class indices of data whose classes have names, in the order of a model's outputs."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from adamerge_jax.data.examples import Examples
from adamerge_jax.data.listing import in_words
from adamerge_jax.errors import InputError
from adamerge_jax.objectives import NOT_PREDICTED

log = logging.getLogger(__name__)

_NO_CLASS = -1

_NAMELESS = re.compile(r"(label[ _]?)?\d+", re.IGNORECASE)
"""The names that tell nothing: `LABEL_0`, which `transformers` writes by default, and numbers."""


def align_labels(examples: Examples, outputs: Sequence[str], name: str, *, outputs_of: str) -> None:
    """Gives examples the labels that the model's outputs have, by the names of their classes.

    Names are compared without regard to case, spaces, `_` and `-`. If no name, or only names that
    tell nothing such as LABEL_0, are on one of the sides, the order of the data's classes is taken
    for that of the outputs.

    Args:
        examples: The examples; their labels and names of classes are changed.
        outputs: The name of the class of each output.
        name: Name of the examples in messages.
        outputs_of: The origin of `outputs` in messages.

    Raises:
        InputError: Examples have a class that none of the outputs has.
    """
    names = examples.class_names
    if names is None or examples.labels is None:
        return
    ours, theirs = [_plain(text) for text in names], [_plain(text) for text in outputs]
    unique = len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs)
    common = set(ours) & set(theirs) if unique else set()
    if common == set(ours):
        order = np.array([theirs.index(text) for text in ours], np.int32)
        missing = [text for text in outputs if _plain(text) not in common]
        if missing:
            log.warning(
                "%s: has no class %s, which %s has; labels are matched by name",
                name,
                in_words(missing),
                outputs_of,
            )
        elif (order != np.arange(len(order))).any():
            log.warning(
                "%s: its classes (%s) are in another order than those of %s (%s); labels are "
                "matched by name",
                name,
                in_words(names),
                outputs_of,
                in_words(outputs),
            )
        _rename(examples, order, outputs)
        return
    tells_nothing = not unique or tell_nothing(names) or tell_nothing(outputs)
    same_place = len(ours) == len(theirs) and all(
        ours.index(text) == theirs.index(text) for text in common
    )
    if examples.names_have_order and tells_nothing:
        return
    used = [names[index] for index in _used(examples)]
    wrong = [text for text in used if _plain(text) not in common]
    if examples.names_have_order and same_place:
        index = next(i for i, text in enumerate(ours) if text not in common)
        log.warning(
            "%s: its classes are not called as those of %s, and are taken in their order: %r is "
            "taken for %r, class %d; give class_names if that is wrong",
            name,
            outputs_of,
            names[index],
            outputs[index],
            index,
        )
        return
    if wrong:
        raise InputError(
            f"{name}: has examples of class {wrong[0]!r}, which is none of {outputs_of} "
            f"({in_words(outputs)}); call it as there, leave such examples out, or give "
            "class_names in the order of the model's outputs"
        )
    order = np.array(
        [theirs.index(text) if text in common else _NO_CLASS for text in ours], np.int32
    )
    extra = [text for text in names if _plain(text) not in common]
    log.warning("%s: its class %r is none of %s; no example has it", name, extra[0], outputs_of)
    _rename(examples, order, outputs)


def names_of_outputs(id2label: Mapping[int, str] | None) -> list[str]:
    """Returns the names of a classifier's outputs in their order."""
    return [
        str(name) for _, name in sorted((id2label or {}).items(), key=lambda item: int(item[0]))
    ]


def _rename(examples: Examples, order: np.ndarray, outputs: Sequence[str]) -> None:
    """Gives labels the numbers of outputs, from those of the outputs by number in the data."""
    labels = examples.labels
    assert labels is not None  # by `align_labels`
    if examples.by_class:
        renamed = np.zeros((len(labels), len(outputs)), labels.dtype)
        renamed[:, order[order != _NO_CLASS]] = labels[:, order != _NO_CLASS]
    else:
        renamed = np.where(labels == NOT_PREDICTED, labels, order[np.maximum(labels, 0)])
    examples.labels, examples.class_names = renamed, list(outputs)


def _used(examples: Examples) -> Int[np.ndarray, " used"]:
    """Returns the classes that examples have, by number."""
    if examples.by_class:
        return np.flatnonzero(examples.labels.any(0))
    used = np.unique(examples.labels)
    return used[used != NOT_PREDICTED]


def tell_nothing(names: Sequence[str]) -> bool:
    """Returns True if all names are numbers or such as LABEL_0."""
    return all(_NAMELESS.fullmatch(name.strip()) for name in names)


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", name.strip().casefold())).strip()
