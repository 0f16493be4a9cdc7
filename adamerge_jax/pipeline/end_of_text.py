"""The end of text: the experts are asked whether they predict it behind their texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from adamerge_jax.checkpoints.matching import MatchedCheckpoint
from adamerge_jax.data.examples import Examples
from adamerge_jax.devices import fetch
from adamerge_jax.evaluation.evaluator import Evaluator
from adamerge_jax.models.family import Network
from adamerge_jax.objectives import NOT_PREDICTED, token_losses
from adamerge_jax.pipeline.models import Models
from adamerge_jax.pipeline.read import load_backbone, load_expert, load_head

EVEN_ODDS = float(np.log(2))
"""The loss of a token that is as likely as all others together, in nats."""


class ExpertsEnds:
    """The experts, asked whether they predict the end of text. Each is asked once.

    An expert that was trained without the token loses so much on it that it would decide the
    coefficients and the table of results alone.

    Attributes:
        probabilities: By task that was asked, the median probability that its expert gives the end
            of text.
    """

    def __init__(
        self,
        models: Models,
        backbone: Callable[..., Any],
        heads: Mapping[str, Network],
        dtype: np.dtype | None,
        batch_size: int,
    ):
        """Keeps the models; weights are read when an expert is asked.

        Args:
            models: The base and its experts.
            backbone: The backbone that all models share, as a function of its parameters.
            heads: Each task's head as a function of its parameters.
            dtype: The dtype of weights; None for the checkpoint's.
            batch_size: Examples per call.
        """
        self.probabilities: dict[str, float] = {}
        self._models = models
        self._backbone = backbone
        self._heads = heads
        self._dtype = dtype
        self._batch_size = batch_size
        self._answers: dict[str, bool] = {}
        self._base: dict[str, Array] | None = None

    def predicts_end(self, task: str, examples: Examples) -> bool:
        """Tells if a task's expert predicts the end of text.

        It does if it gives that token at least even odds, or no smaller probability than the other
        tokens that it is to predict; both are medians over the examples.

        Args:
            task: The task.
            examples: N examples, the last token of each the end of text. The first ones that are
                given count.
        """
        if task not in self._answers:
            end_losses, other_losses = self._losses(task, examples)
            self.probabilities[task] = float(np.exp(-np.median(end_losses)))
            self._answers[task] = bool(
                np.median(end_losses) <= max(EVEN_ODDS, np.median(other_losses))
            )
        return self._answers[task]

    def _losses(self, task: str, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
        """Returns the expert's loss on the last token of each example, and the mean on others."""
        parameters = self._read_expert(task)
        head = {
            name: jnp.asarray(array, self._dtype)
            for name, array in load_head(self._models, task).items()
        }
        head = self._models.devices.replicate(head)
        evaluator = Evaluator(
            self._backbone, {task: self._heads[task]}, {task: head}, self._batch_size, "loss"
        )
        everything = np.arange(len(examples))
        length = examples.padded_length(everything)  # one for all, which is compiled once
        end_losses, other_losses = [], []
        for start in range(0, len(examples), self._batch_size):
            index = np.resize(everything[start : start + self._batch_size], self._batch_size)
            labels = examples.take_labels(index, length)
            assert labels is not None
            logits, _ = evaluator.run(parameters, task, examples.take(index, length))
            losses = fetch(token_losses(logits, labels))
            for row in range(min(self._batch_size, len(examples) - start)):
                *others, end = losses[row][labels[row] != NOT_PREDICTED]
                end_losses.append(end)
                other_losses.append(np.mean(others))
        return np.array(end_losses), np.array(other_losses)

    def _read_expert(self, task: str) -> dict[str, Array]:
        if isinstance(self._models.experts[task], MatchedCheckpoint):
            return load_expert(self._models, task, {}, self._dtype)
        if self._base is None:
            self._base = load_backbone(self._models, self._models.base, self._dtype)
        return load_expert(self._models, task, self._base, self._dtype)


def ends_in_words(examples: Mapping[str, Examples], probabilities: Mapping[str, float]) -> str:
    """Returns a description of the ends of text, for the summary of a run; empty if there are none.

    Args:
        examples: The examples by task.
        probabilities: The experts' probabilities of the end of text, by task that was asked.
    """
    parts = []
    for end in ("append", "leave"):
        tasks = [
            f"{task} {probabilities[task]:.2g}" if task in probabilities else task
            for task, task_examples in examples.items()
            if task_examples.end_of_text == end
        ]
        if tasks:
            parts.append(f"{end} ({', '.join(tasks)})")
    return f"end of text: {', '.join(parts)}" if parts else ""
