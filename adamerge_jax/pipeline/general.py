"""General text, on which a merge is to stay as the base is: the base is its own teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int

from adamerge_jax.data.examples import Examples, Subset, bucket_length
from adamerge_jax.data.prompts import FEWEST_TOKENS, GENERAL, Prompts
from adamerge_jax.errors import InputError
from adamerge_jax.evaluation.retention import General

if TYPE_CHECKING:
    from adamerge_jax.pipeline.base_answers import BaseWriter
    from adamerge_jax.pipeline.example_loader import ExampleLoader
    from adamerge_jax.recipes.schema import LearningRecipe, RetainRecipe

NAME = "general text (retain)"
"""Its name in messages."""

FEWEST = 2
"""Examples, at least, to learn from and to test with."""

MOST_TESTED = 100
"""Examples of general text, at most, that only the table of results uses."""

TESTED = 1 / 3
"""The part of general text that is kept for that."""

ENOUGH_PROMPTS = 150
"""The package's prompts that must fit: the short ones alone are no general text."""

OPENING = 16
"""The largest number of tokens of an answer's first sentence."""


class FoundText(NamedTuple):
    """General text before the base has written answers.

    Attributes:
        text: Prompts without answers, or examples.
        learned: The positions of those to learn from.
        tested: The positions of those for the table of results.
        source: The general text in the recipe, with its path.
    """

    text: Prompts | Examples
    learned: Int[np.ndarray, " N"]
    tested: Int[np.ndarray, " M"]
    source: RetainRecipe

    def padded_lengths(self) -> Int[np.ndarray, " N"]:
        """Returns the tokens to which each example to learn from is padded, with a whole answer."""
        if isinstance(self.text, Examples):
            return self.text.padded_lengths()[self.learned]
        lengths = [len(self.text.tokens[i]) + self.source.new_tokens for i in self.learned]
        return np.minimum(np.array([*map(bucket_length, lengths)]), self.text.max_length)


def find_general(
    source: RetainRecipe | None,
    settings: LearningRecipe,
    load: ExampleLoader,
    *,
    is_chat: bool,
    seed: int,
) -> FoundText | None:
    """Finds general text and divides it.

    Args:
        source: The general text; None for none, without a path for the package's own.
        settings: The numbers of steps and examples: no more are learned from than are drawn.
        load: The loader of examples.
        is_chat: True for a chat model.
        seed: Decides which examples are learned from.

    Returns:
        The text; None where no path is given and it is no chat model, or the package's prompts do
        not fit.

    Raises:
        InputError: The text cannot be used: the models are classifiers, or cannot write the answers
            that are missing, or too few of them fit.
    """
    family = load.family
    # Without a cache it takes long, and the package's own prompts are many.
    is_asked = is_chat and family.cached_features is not None
    can_write = family.writes and family.images is None and not family.encodes_prompts
    if source is None or (source.path is None and not is_asked):
        return None
    if not family.language:
        raise InputError(
            "retain: is for language models, and these are classifiers, whose base has no head for "
            "general data; leave it out"
        )
    has_path = source.path is not None
    if not has_path:
        source = source.model_copy(update={"path": str(GENERAL)})
    text: Prompts | Examples | None = load.prompts(source, NAME, is_chat=is_chat)
    if not has_path and len(text) < ENOUGH_PROMPTS:
        return None
    if text is not None and not can_write:
        raise InputError(
            f"{NAME}: {source.path} has no answers, which models that read images and "
            "encoder-decoders are not asked for; give them"
        )
    fitting = "" if text is None else f" that leave {FEWEST_TOKENS} tokens for an answer"
    if text is None:
        text = load(source, NAME)
    learned, tested = _split(len(text), source, settings, seed)
    needed = FEWEST
    if source.weight:
        needed = settings.batch_size + max(1, round(settings.held_out * len(learned)))
    if len(learned) < needed or len(tested) < FEWEST:
        if not has_path:
            return None
        raise InputError(
            f"{NAME}: {source.path} has too few examples{fitting} within max_length="
            f"{load.max_length}: {len(learned)} to learn from and {len(tested)} for the table of "
            f"results, where {needed} and {FEWEST} are needed; give more, raise max_length, or "
            "lower learning.batch_size"
        )
    return FoundText(text, learned, tested, source)


def load_general(found: FoundText, writer: BaseWriter | None) -> General:
    """Makes examples of general text; the base writes the answers that it lacks.

    Args:
        found: The text.
        writer: The writer of the base's answers; None if none are lacking.
    """
    text, learned, tested, source = found
    if isinstance(text, Examples):
        learning = Subset(text, learned) if source.weight else None
        return General(learning, Subset(text, tested), None)
    assert writer is not None  # `find_general` has seen to it
    used = np.concatenate([tested, learned]) if source.weight else tested
    asked = [text.tokens[prompt] for prompt in used]
    answers = writer.answers(asked, text.stops, source.new_tokens)
    examples = text.answered(used, answers)
    tested, learned = np.split(np.arange(len(used)), [len(tested)])
    openings = np.array([text.opening(answers[row], OPENING) for row in tested])
    learning = Subset(examples, learned) if source.weight else None
    return General(learning, Subset(examples, tested), openings)


def _split(
    count: int, source: RetainRecipe, settings: LearningRecipe, seed: int
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " M"]]:
    """Returns the examples to learn from, no more than are drawn, and those to test with."""
    order = np.random.default_rng([seed, 7]).permutation(count)[: source.limit]
    tested, learned = np.split(order, [min(MOST_TESTED, int(TESTED * len(order)))])
    most = settings.batch_size * (settings.steps + 2)
    return learned[: min(most, settings.examples or most)], tested
