"""How good a model is: accuracy per task, with each task's own head."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from adamerge_jax.data import Examples, sorted_batches
from adamerge_jax.models import Network, head_parameters

Parameters = Mapping[str, Array]


class Row(NamedTuple):
    """One line of the table of results.

    Attributes:
        method: What was evaluated.
        tasks: Accuracy by task, from 0 to 1.
    """

    method: str
    tasks: dict[str, float]

    @property
    def average(self) -> float:
        """Mean accuracy over the tasks."""
        return float(np.mean(list(self.tasks.values())))

    def as_json(self) -> dict:
        """The row as `results.json` holds it."""
        return {"method": self.method, "tasks": self.tasks, "average": self.average}


class Evaluator:
    """Runs models of one architecture on the examples of their tasks.

    The trunk is compiled once per input shape and shared by all models and tasks.
    """

    def __init__(
        self,
        trunk: Network,
        heads: Mapping[str, Network],
        kept_by_tasks: Mapping[str, Parameters],
        batch_size: int,
    ):
        self._trunk = jax.jit(trunk, static_argnames="hidden_states")
        self._heads = {task: jax.jit(head) for task, head in heads.items()}
        self._networks = heads
        self._kept_by_tasks = kept_by_tasks
        self._batch_size = batch_size

    def run(
        self,
        parameters: Parameters,
        task: str,
        inputs: Mapping[str, np.ndarray],
        hidden_states: Sequence[int] = (),
    ) -> tuple[Float[Array, "B C"], dict[int, Float[Array, "B T H"]]]:
        """The logits of one batch, and the hidden states of the layers asked for.

        Args:
            parameters: Of the trunk, arrays by name.
            task: Whose head to use.
            inputs: Of the model, `[B, ...]`.
            hidden_states: Layers, 0 for the embeddings.
        """
        outputs = self._trunk(parameters, inputs, hidden_states=bool(hidden_states))
        own = head_parameters(self._networks[task], self._kept_by_tasks[task], parameters)
        logits = self._heads[task](own, outputs)
        return logits, {layer: outputs.hidden_states[layer] for layer in hidden_states}

    def logits(
        self, parameters: Parameters, task: str, examples: Examples
    ) -> Float[np.ndarray, "N C"]:
        """What a model says of each example.

        Args:
            parameters: Of the trunk, arrays by name.
            task: Whose head to use.
            examples: N examples.
        """
        order, rows = [], []
        for index, inputs in sorted_batches(examples, self._batch_size):
            order.append(index)
            rows.append(np.asarray(self.run(parameters, task, inputs)[0])[: len(index)])
        return np.concatenate(rows)[np.argsort(np.concatenate(order))]

    def accuracy(self, parameters: Parameters, task: str, examples: Examples) -> float:
        """The share of labelled examples, from 0 to 1, that a model gives their own class."""
        predicted = self.logits(parameters, task, examples).argmax(-1)
        return float((predicted == examples.labels).mean())

    def row(self, method: str, parameters: Parameters, data: Mapping[str, Examples]) -> Row:
        """A model's accuracy on labelled examples of each task."""
        return Row(method, {task: self.accuracy(parameters, task, data[task]) for task in data})
