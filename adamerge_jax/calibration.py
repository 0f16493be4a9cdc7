"""Unlabeled batches of fixed shape: every batch holds the same number of examples of every task.

Texts are padded to one of a few bucket lengths, so that few shapes are compiled.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from adamerge_jax.data import Examples
from adamerge_jax.errors import InputError


class Batch(NamedTuple):
    """Examples of all tasks.

    Attributes:
        inputs: Model inputs, `[tasks * B, ...]`: B examples of the first task, of the second, ...
        weights: `[tasks, B]`, the share of each example in its task's mean; rows sum to 1, or to
            less where the mean is spread over several batches.
        expert_logits: `[B, C]` for each task, or an empty list where no objective needs them.
    """

    inputs: dict[str, np.ndarray]
    weights: Float[np.ndarray, "tasks B"]
    expert_logits: Sequence[Float[np.ndarray, "B C"]] = ()


class Calibration(NamedTuple):
    """The calibration data of all tasks, split in two.

    Attributes:
        learning: Indices of the examples that coefficients are learned from, by task.
        held_out: Indices of those that choose which coefficients are kept, by task.
        examples: The examples by task.
        batch_size: B, examples of every task in a batch.
        seed: Decides on the split and on the order.
        expert_logits: What each task's expert says of its examples, `[N, C]`; empty where no
            objective needs it.
    """

    learning: dict[str, Int[np.ndarray, " N"]]
    held_out: dict[str, Int[np.ndarray, " M"]]
    examples: Mapping[str, Examples]
    batch_size: int
    seed: int
    expert_logits: Mapping[str, Float[np.ndarray, "N C"]]

    def batches(self) -> Iterator[Batch]:
        """Endless batches for learning; a task's examples are reshuffled when they are used up."""
        orders = {task: np.empty(0, int) for task in self.examples}
        epochs = dict.fromkeys(self.examples, 0)
        weights = np.full((len(self.examples), self.batch_size), 1 / self.batch_size, np.float32)
        while True:
            chosen = {}
            for position, (task, index) in enumerate(self.learning.items()):
                while len(orders[task]) < self.batch_size:
                    generator = np.random.default_rng([self.seed, 1, position, epochs[task]])
                    orders[task] = np.concatenate([orders[task], generator.permutation(index)])
                    epochs[task] += 1
                chosen[task], orders[task] = np.split(orders[task], [self.batch_size])
            yield self._batch(chosen, weights)

    def held_out_batches(self) -> Iterator[Batch]:
        """Batches that together hold every held-out example once."""
        longest = max(map(len, self.held_out.values()))
        for start in range(0, longest, self.batch_size):
            weights = np.zeros((len(self.examples), self.batch_size), np.float32)
            chosen = {}
            for row, (task, index) in zip(weights, self.held_out.items(), strict=True):
                part = index[start : start + self.batch_size]
                row[: len(part)] = 1 / len(index)
                chosen[task] = np.resize(part if len(part) else index, self.batch_size)
            yield self._batch(chosen, weights)

    def _batch(
        self, chosen: Mapping[str, Int[np.ndarray, " B"]], weights: Float[np.ndarray, "tasks B"]
    ) -> Batch:
        length = max(self.examples[task].padded_length(index) for task, index in chosen.items())
        parts = [self.examples[task].take(index, length) for task, index in chosen.items()]
        inputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        logits = [self.expert_logits[task][chosen[task]] for task in self.expert_logits]
        return Batch(inputs, weights, logits)


def calibrate(
    examples: Mapping[str, Examples],
    *,
    batch_size: int,
    held_out: float,
    seed: int,
) -> Calibration:
    """Splits each task's examples into those to learn from and those held out.

    Args:
        examples: Examples by task.
        batch_size: Examples of every task in a batch.
        held_out: Part of each task's examples that is held out; at least one is.
        seed: Decides on the split and on the order of batches.

    Raises:
        InputError: A task has too few examples for one batch and one held-out example.
    """
    learning, kept = {}, {}
    for position, (task, data) in enumerate(examples.items()):
        size = max(1, round(held_out * len(data)))
        if len(data) - size < batch_size:
            raise InputError(
                f"calibration data of task {task!r}: {len(data)} example(s), {size} of them held "
                f"out, leave fewer than the {batch_size} of one batch; give more, or lower "
                "learning.batch_size"
            )
        order = np.random.default_rng([seed, 0, position]).permutation(len(data))
        # Held-out examples of like length share a batch: there is no need to mix them, and less
        # is computed on padding.
        kept[task] = order[:size][np.argsort(data.padded_lengths()[order[:size]], kind="stable")]
        learning[task] = np.sort(order[size:])
    return Calibration(learning, kept, examples, batch_size, seed, {})
