"""The kind of models that a base and its experts are, and the options that matter for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from adamerge_jax.drafting import columns
from adamerge_jax.drafting.columns import Columns
from adamerge_jax.drafting.samples import Sample
from adamerge_jax.models.family import Family
from adamerge_jax.models.problem import CLASSES, LABELS, NUMBERS, WORDS, Problem

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of models.

    Attributes:
        words: The kind in words.
        calibration: Finds the columns of examples to learn from.
        scored: Finds the columns of validation and test examples; None if nothing is learned.
        example: Data to learn from in words, for a recipe that lacks them.
        reads_text: True if the models read texts.
        has_heads: True if each task has a head of its own.
        of_classes: True if the head gives one of several classes.
    """

    words: str
    calibration: Callable[[Sample], Columns]
    scored: Callable[[Sample], Columns]
    example: str
    reads_text: bool = True
    has_heads: bool = False
    of_classes: bool = False


_LABELS = {
    CLASSES.name: columns.with_label,
    WORDS.name: columns.with_tags,
    NUMBERS.name: columns.with_numbers,
    LABELS.name: columns.with_labels,
}
"""The functions that find the labels, by the name of the problem."""

_OF_PROBLEMS = {
    CLASSES.name: "classifier of {}",
    WORDS.name: "classifier of words",
    NUMBERS.name: "model that gives numbers for {}",
    LABELS.name: "classifier of {} with any number of labels",
}


def kind_of(family: Family, config: PretrainedConfig, problem: Problem) -> Kind:
    """Returns the kind of a model of a family that can be run.

    Args:
        family: The family.
        config: The base's config.
        problem: The problem that the head of the expert solves.
    """
    name = config.model_type
    if family.language:
        return _language_kind(family, config)
    if family.embeds is not None:
        return Kind(
            f"sentence embedder ({name})",
            columns.of_embedder,
            lambda sample: columns.with_score(columns.of_embedder(sample), sample),
            'lines {"text": "..."}',
        )
    reads_text = family.inputs[0] == "input_ids"
    find = columns.of_texts if reads_text else columns.of_images
    example = 'lines {"text": "..."}' if reads_text else "a folder of images"
    if problem == WORDS:
        find, example = columns.of_words, 'lines {"tokens": ["a", "word", ...]}'
    heads = ", zero-shot heads from the names of classes" if family.auto_class is None else ""
    words = _OF_PROBLEMS[problem.name].format("texts" if reads_text else "images")
    return Kind(
        f"{words} ({name}{heads})",
        find,
        lambda sample: _LABELS[problem.name](find(sample), sample),
        example,
        reads_text,
        has_heads=True,
        of_classes=problem == CLASSES,
    )


def _language_kind(family: Family, config: PretrainedConfig) -> Kind:
    pairs_only = bool(config.is_encoder_decoder)

    def find(sample: Sample) -> Columns:
        return columns.of_language(sample, pairs_only=pairs_only)

    example = 'lines {"prompt": "...", "response": "..."}'
    if not pairs_only:
        example += ', {"messages": [{"role": "user", "content": "..."}, ...]} or {"text": "..."}'
    images = " that reads images" if family.images is not None else ""
    return Kind(f"language model{images} ({config.model_type})", find, find, example)


def longest_text(samples: Mapping[str, Sample], characters_in_a_token: float = 3.5) -> int:
    """Returns about the number of tokens that nearly all examples have at most.

    Args:
        samples: The first rows of each task.
        characters_in_a_token: An estimate that is on the safe side for English.
    """
    longest = 0
    for sample in samples.values():
        lengths = sorted(map(sum, zip(*map(_lengths, sample.columns.values()), strict=False)))
        if lengths:
            longest = max(longest, lengths[int(0.95 * (len(lengths) - 1))])
    return round(longest / characters_in_a_token)


def _lengths(values: object) -> list[int]:
    """Returns the number of characters of each value: a text, or the turns of a conversation."""
    lengths = []
    for value in values if isinstance(values, list | tuple) else ():
        if isinstance(value, list):
            turns = [turn.get("content") for turn in value if isinstance(turn, dict)]
            # A turn's marks in the template are some five tokens.
            lengths.append(sum(len(turn) + 20 for turn in turns if isinstance(turn, str)))
        else:
            lengths.append(len(value) if isinstance(value, str) else 0)
    return lengths
