"""The agreement of a merge with its base on general text."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from adamerge_jax.data.examples import Examples, sorted_batches
from adamerge_jax.data.expert_targets import AskExpert, ask_expert
from adamerge_jax.devices import fetch
from adamerge_jax.objectives import NOT_PREDICTED, TargetSpec, TopTokens
from adamerge_jax.objectives.distributions import with_rest
from adamerge_jax.runs.rows import ExampleScores, Measures, Metric

RETAINED = "base"
"""The name of general text among the tasks that are learned from; no task can be called so."""

GENERAL_TEXT = "general text"
"""Its name in tables."""

BATCH_SIZE = 16
"""Examples, at most, that are compared at a time: logits and all that is computed of them are the
largest arrays of an evaluation."""

TOP_TOKENS = 64
"""The base's likeliest tokens that are kept at each position, for the table of results."""


class General(NamedTuple):
    """General text with the base's own answers.

    Attributes:
        learning: The examples to learn from; None where nothing is learned from general text.
        test: Other ones, for the table of results.
        openings: The tokens of each test example's first sentence, where the base has written it;
            None where it has not.
    """

    learning: Examples | None
    test: Examples
    openings: Int[np.ndarray, " N"] | None


class Retention:
    """The comparison of models with the base on general text."""

    def __init__(self, general: General, ask_base: AskExpert, batch_size: int):
        """Asks the base.

        Args:
            general: General text, of which N examples are for tests.
            ask_base: The base, from inputs to its logits.
            batch_size: Examples per call.
        """
        self._examples = examples = general.test
        self._openings = general.openings
        self._batch_size = batch_size = min(batch_size, BATCH_SIZE)
        spec = TargetSpec(expert_logits=True, top_tokens=TOP_TOKENS)
        self._targets = ask_expert(ask_base, examples, spec, batch_size=batch_size)

    def __len__(self) -> int:
        return len(self._examples)

    def measures(self, run: Callable[[dict[str, np.ndarray]], Float[Array, "B T V"]]) -> Measures:
        """Compares a model with the base.

        Args:
            run: The model, from inputs to its logits.

        Returns:
            By example: 1 if the model writes the first sentence of the base's answer, else 0,
            where the base has written answers; the tokens whose likeliest is the base's; and the
            divergence from the base, both with the number of tokens.
        """
        count = len(self._examples)
        answers, agreed, divergence = (np.zeros(count, np.float32) for _ in range(3))
        tokens = np.zeros(count, np.int32)
        for index, inputs in sorted_batches(self._examples, self._batch_size):
            logits = run(inputs)
            length = logits.shape[1]
            # The last batch repeats examples, which do not count.
            full = np.resize(index, len(logits))
            targets = self._targets.take(full, length)
            is_counted = targets.labels != NOT_PREDICTED
            agrees, divergences = _compare(logits, targets.expert_top)
            agrees, divergences = fetch(agrees), fetch(divergences)
            for row, example in enumerate(index):
                places = np.flatnonzero(is_counted[row])
                tokens[example] = len(places)
                agreed[example] = agrees[row, places].sum()
                divergence[example] = divergences[row, places].sum()
                if self._openings is not None:
                    # A model writes the base's tokens as long as each is its likeliest.
                    opening = places[: self._openings[example]]
                    answers[example] = agrees[row, opening].all()
        measures: dict[Metric, ExampleScores] = {
            "base_answers": ExampleScores(answers, np.ones(count, np.int32)),
            "base_agreement": ExampleScores(agreed, tokens),
            "base_divergence": ExampleScores(divergence, tokens),
        }
        if self._openings is None:
            del measures["base_answers"]
        return measures


@jax.jit
def _compare(
    logits: Float[Array, "B T V"], base: TopTokens
) -> tuple[Bool[Array, "B T"], Float[Array, "B T"]]:
    """Returns where the likeliest token is the base's, and the divergence from the base."""
    model, expected = with_rest(logits, base)
    # Rounding leaves a little less than 0 where the model is the base.
    divergence = jnp.maximum((jnp.exp(expected) * (expected - model)).sum(-1), 0)
    is_number = ~jnp.isnan(logits).any(-1)
    return (logits.argmax(-1) == base.tokens[..., 0]) & is_number, divergence
