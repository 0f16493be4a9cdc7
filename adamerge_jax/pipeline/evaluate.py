"""Evaluation: accuracy of each task with its own head, or a language model's loss per task."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from adamerge_jax.data.examples import Examples, sorted_batches
from adamerge_jax.devices import fetch
from adamerge_jax.models.family import Network, complete_head
from adamerge_jax.objectives import NOT_PREDICTED, token_losses
from adamerge_jax.runs.results import Metric, Row

Parameters = Mapping[str, Array]


class Evaluator:
    """Runs models of one architecture on the examples of their tasks.

    The backbone is compiled once per input shape and shared by all models and tasks.
    """

    def __init__(
        self,
        backbone: Network,
        heads: Mapping[str, Network],
        head_parameters: Mapping[str, Parameters],
        batch_size: int,
        metric: Metric = "accuracy",
    ):
        """Compiles nothing yet.

        Args:
            backbone: What all models share.
            heads: By task.
            head_parameters: Parameters of each task's head.
            batch_size: Examples per batch.
            metric: What a score is.
        """
        self.metric = metric
        self._backbone = jax.jit(backbone, static_argnames="hidden_states")
        self._heads = {task: jax.jit(head) for task, head in heads.items()}
        self._networks = heads
        self._head_parameters = head_parameters
        self.batch_size = batch_size

    def run(
        self,
        parameters: Parameters,
        task: str,
        inputs: Mapping[str, np.ndarray],
        hidden_states: Sequence[int] = (),
    ) -> tuple[Float[Array, "B C"], dict[int, Float[Array, "B T H"]]]:
        """The logits of one batch, and the hidden states of the layers asked for.

        A language model's logits are `[B, T, V]`.

        Args:
            parameters: Of the backbone, arrays by name.
            task: Whose head to use.
            inputs: Of the model, `[B, ...]`.
            hidden_states: Layers, 0 for the embeddings.
        """
        outputs = self._backbone(parameters, inputs, hidden_states=bool(hidden_states))
        own = complete_head(self._networks[task], self._head_parameters[task], parameters)
        logits = self._heads[task](own, outputs)
        return logits, {layer: outputs.hidden_states[layer] for layer in hidden_states}

    def logits(
        self, parameters: Parameters, task: str, examples: Examples
    ) -> Float[np.ndarray, "N C"]:
        """What a model says of each example.

        Args:
            parameters: Of the backbone, arrays by name.
            task: Whose head to use.
            examples: N examples.
        """
        order, rows = [], []
        for index, inputs in sorted_batches(examples, self.batch_size):
            order.append(index)
            rows.append(fetch(self.run(parameters, task, inputs)[0])[: len(index)])
        return np.concatenate(rows)[np.argsort(np.concatenate(order))]

    def score(self, parameters: Parameters, task: str, examples: Examples) -> float:
        """How good a model is on labelled examples.

        Returns:
            The share of examples that get their own class, from 0 to 1; or for a language model
            the mean loss over all tokens to be predicted, in nats per token.
        """
        if self.metric == "accuracy":
            predicted = self.logits(parameters, task, examples).argmax(-1)
            return float((predicted == examples.labels).mean())
        total, count = 0.0, 0
        for index, inputs in sorted_batches(examples, self.batch_size):
            logits, _ = self.run(parameters, task, inputs)
            labels = examples.take_labels(index, logits.shape[1])
            # The last batch repeats examples, which do not count.
            missing = [(0, len(logits) - len(labels)), (0, 0)]
            labels = np.pad(labels, missing, constant_values=NOT_PREDICTED)
            total += float(_total_loss(logits, labels))
            count += int((labels != NOT_PREDICTED).sum())
        return total / count

    def row(self, method: str, parameters: Parameters, data: Mapping[str, Examples]) -> Row:
        """A model's score on labelled examples of each task."""
        scores = {task: self.score(parameters, task, data[task]) for task in data}
        return Row(method, scores, self.metric)


@jax.jit
def _total_loss(logits: Float[Array, "B T V"], labels: Int[Array, "B T"]) -> Float[Array, ""]:
    return token_losses(logits, labels).sum()
