"""Batches of fixed shape: every batch holds the same number of examples of every task.

Texts lie behind each other in rows, so that little is computed on padding. Where a model cannot
read them so, they are padded to one of a few bucket lengths, so that few shapes are compiled, and
texts of like length share a batch.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from adamerge_jax.data.augmentations import augment
from adamerge_jax.data.examples import Examples, joined, require_joinable
from adamerge_jax.data.expert_targets import CrossTaskLogits, StoredTargets
from adamerge_jax.data.packing import BATCHES_TRIED, Packing, packing_for, token_counts
from adamerge_jax.devices import Devices
from adamerge_jax.errors import InputError
from adamerge_jax.objectives import Targets
from adamerge_jax.stacks import Stacked

BATCHES_SORTED_TOGETHER = 16
"""The number of batches in a row that share their texts by length: the shortest texts of all tasks
make one batch, the next longer ones the next. They are fewer where the examples of a task do not
fill so many: the same text, drawn twice, would be sorted beside itself."""


class Batch(NamedTuple):
    """Examples of all tasks.

    Attributes:
        inputs: Model inputs, `[tasks * B, ...]`: B examples of the first task, of the second, ...
        weights: `[tasks, B]`, the share of each example in its task's mean; rows sum to 1, or to
            less where the mean is spread over several batches.
        targets: The targets of each task's examples, `[B, ...]`; those of tasks that are alike in
            one array, `[G, B, ...]`, where they are `Stacked`.
        augmented_inputs: The same examples, augmented, or None where no objective asks for them.
    """

    inputs: dict[str, np.ndarray]
    weights: Float[np.ndarray, "tasks B"]
    targets: Sequence[Targets]
    augmented_inputs: dict[str, np.ndarray] | None = None

    def spread(self, devices: Devices) -> "Batch":
        """Gives every device as many examples of every task, one device after the other.

        If B is no multiple of the number of devices, the last example of each task is repeated;
        `weights` stay those of B examples, by which a step leaves the copies out.
        """
        if devices.mesh is None:
            return self
        tasks, size = self.weights.shape
        count = devices.mesh.size
        missing = -size % count

        def filled(array: np.ndarray) -> np.ndarray:
            """Fills up `[G, B, ...]`."""
            widths = [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2)
            return np.pad(array, widths, "edge") if missing else array

        def by_device(array: np.ndarray) -> np.ndarray:
            shape = array.shape[1:]
            blocks = filled(array.reshape(tasks, size, *shape)).reshape(tasks, count, -1, *shape)
            return np.ascontiguousarray(blocks.swapaxes(0, 1)).reshape(-1, *shape)

        targets = jax.tree.map(filled, Stacked.of(self.targets))
        inputs, augmented = jax.tree.map(by_device, (self.inputs, self.augmented_inputs))
        return Batch(
            devices.examples(inputs),
            self.weights,
            devices.examples(targets, axis=1),
            devices.examples(augmented),
        )


class Calibration(NamedTuple):
    """The calibration data of all tasks, split in two.

    Attributes:
        learning: Indices of the examples that coefficients are learned from, by task.
        held_out: Indices of the examples that the best coefficients are chosen by, by task.
        examples: The examples by task.
        batch_size: B, examples of every task in a batch.
        seed: Decides on the split and on the order.
        targets: The targets of each task's examples.
        augmented: Whether batches hold their examples augmented too.
        cross_task: By task, its expert's logits on the examples of the other tasks; batches to
            learn from have them as targets.
        prompts: The tasks whose batches to learn from have the positions of prompts as targets.
        packing: The rows that the texts of a batch are packed in; None for a row each.
    """

    learning: dict[str, Int[np.ndarray, " N"]]
    held_out: dict[str, Int[np.ndarray, " M"]]
    examples: Mapping[str, Examples]
    batch_size: int
    seed: int
    targets: Mapping[str, StoredTargets]
    augmented: bool = False
    cross_task: Mapping[str, CrossTaskLogits] = {}
    prompts: Collection[str] = ()
    packing: Packing | None = None

    def packed(self) -> "Calibration":
        """Returns the same with texts packed in rows, where that saves much of the padding."""
        counts = {
            task: of_task
            for task, data in self.examples.items()
            if (of_task := token_counts(data)) is not None
        }
        if len(counts) < len(self.examples):
            return self
        padded_tokens = sum(
            len(chosen) * self.batch_size * self._longest(chosen)
            for chosen in islice(self._chosen(), BATCHES_TRIED)
        )
        longest = max(int(data.padded_lengths().max()) for data in self.examples.values())
        mixed = self._replace(packing=Packing(longest, 1))
        lengths = [
            np.concatenate([counts[task][index] for task, index in chosen.items()])
            for chosen in islice(mixed._chosen(), BATCHES_TRIED)
        ]
        return self._replace(packing=packing_for(lengths, longest, padded_tokens))

    def with_fewer_held_out(self, task: str) -> "Calibration":
        """Returns the same with no more held-out examples of a task than of the others.

        A task with more would add batches in which the others have nothing. Its other held-out
        examples are learned from.
        """
        held_out, learning = dict(self.held_out), dict(self.learning)
        index = held_out.pop(task)
        most = max(map(len, held_out.values()))
        if most >= len(index):
            return self
        # They are in the order of their lengths.
        chosen = np.linspace(0, len(index) - 1, most).round().astype(int)
        learning[task] = np.sort(np.concatenate([learning[task], np.delete(index, chosen)]))
        return self._replace(held_out={**self.held_out, task: index[chosen]}, learning=learning)

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """Yields batches for learning without end.

        A task's examples are reshuffled when they are used up.

        Args:
            first: The number of batches to leave out at the beginning; they are not put together.
        """
        weights = np.full((len(self.examples), self.batch_size), 1 / self.batch_size, np.float32)
        for number, chosen in enumerate(self._chosen()):
            if number >= first:
                generator = np.random.default_rng([self.seed, 4, number])
                yield self._batch(chosen, weights, generator, learns=True)

    def _chosen(self) -> Iterator[dict[str, Int[np.ndarray, " B"]]]:
        """Yields the examples of batches for learning by task, without end."""
        lengths = {task: examples.padded_lengths() for task, examples in self.examples.items()}
        together = 1
        differ = any(len(np.unique(task_lengths)) > 1 for task_lengths in lengths.values())
        if differ and self.packing is None:
            fewest = min(map(len, self.learning.values()))
            together = min(BATCHES_SORTED_TOGETHER, fewest // self.batch_size)
        draws = {
            task: self._draws(position, together * self.batch_size)
            for position, task in enumerate(self.examples)
        }
        generator = np.random.default_rng([self.seed, 2])
        while True:
            parts = {}
            for task, drawn in draws.items():
                index = next(drawn)
                index = index[np.argsort(lengths[task][index], kind="stable")]
                parts[task] = index.reshape(together, self.batch_size)
            for part in generator.permutation(together):
                yield {task: rows[part] for task, rows in parts.items()}

    def _longest(self, chosen: Mapping[str, Int[np.ndarray, " B"]]) -> int:
        """Returns the tokens that the texts of a batch are padded to."""
        return max(self.examples[task].padded_length(index) for task, index in chosen.items())

    def _while_learning(
        self, targets: Targets, task: str, chosen: Mapping[str, Int[np.ndarray, " B"]], length: int
    ) -> Targets:
        """Adds the targets of a task that held-out examples do not have."""
        if task in self.cross_task:
            targets = targets._replace(cross_task=self.cross_task[task].take(chosen))
        if task in self.prompts:
            prompts = self.examples[task].take_prompts(chosen[task], length)
            targets = targets._replace(prompts=prompts)
        return targets

    def _draws(self, position: int, size: int) -> Iterator[Int[np.ndarray, " size"]]:
        """Yields one task's examples without end, reshuffled when they are used up."""
        index = list(self.learning.values())[position]
        order = np.empty(0, int)
        for epoch in count():
            generator = np.random.default_rng([self.seed, 1, position, epoch])
            order = np.concatenate([order, generator.permutation(index)])
            while len(order) >= size:
                drawn, order = np.split(order, [size])
                yield drawn

    def held_out_batches(self) -> Iterator[Batch]:
        """Yields batches that together hold every held-out example once."""
        longest = max(map(len, self.held_out.values()))
        starts = range(0, longest, self.batch_size)
        batches = [slice(start, start + self.batch_size) for start in starts]
        if self.packing is not None:  # short and long texts in each
            batches = [slice(number, None, len(starts)) for number in range(len(starts))]
        for start, batch in zip(starts, batches, strict=True):
            weights = np.zeros((len(self.examples), self.batch_size), np.float32)
            chosen = {}
            for row, (task, index) in zip(weights, self.held_out.items(), strict=True):
                part = index[batch]
                row[: len(part)] = 1 / len(index)
                chosen[task] = np.resize(part if len(part) else index, self.batch_size)
            yield self._batch(chosen, weights, np.random.default_rng([self.seed, 3, start]))

    def _batch(
        self,
        chosen: Mapping[str, Int[np.ndarray, " B"]],
        weights: Float[np.ndarray, "tasks B"],
        generator: np.random.Generator,
        *,
        learns: bool = False,
    ) -> Batch:
        length = self._longest(chosen) if self.packing is None else self.packing.length
        parts = [self.examples[task].take(index, length) for task, index in chosen.items()]
        inputs = joined(parts)
        if self.packing is not None:
            inputs = self.packing.pack(inputs)
        targets = [self.targets[task].take(index, length) for task, index in chosen.items()]
        if learns:
            targets = [
                self._while_learning(of_task, task, chosen, length)
                for task, of_task in zip(chosen, targets, strict=True)
            ]
        augmented_inputs = augment(inputs, generator) if self.augmented else None
        return Batch(inputs, weights, Stacked.of(targets), augmented_inputs)


def calibrate(
    examples: Mapping[str, Examples],
    *,
    batch_size: int,
    held_out: float,
    seed: int,
    targets: Mapping[str, StoredTargets] | None = None,
) -> Calibration:
    """Splits each task's examples into those to learn from and those held out.

    Args:
        examples: Examples by task.
        batch_size: Examples of every task in a batch.
        held_out: Part of each task's examples that is held out; at least one is.
        seed: Decides on the split and on the order of batches.
        targets: The targets of each task's examples, from `ask_expert`; by default their labels,
            where they have some.

    Raises:
        InputError: A task has too few examples for one batch and one held-out example, or no
            targets where others have some, or the tasks' examples cannot share a batch.

    Examples:
        >>> import numpy as np
        >>> from adamerge_jax import ArrayExamples, calibrate
        >>> examples = {task: ArrayExamples({"x": np.zeros((20, 3))}) for task in ("one", "other")}
        >>> calibration = calibrate(examples, batch_size=4, held_out=0.25, seed=0)
        >>> {task: len(index) for task, index in calibration.held_out.items()}
        {'one': 5, 'other': 5}
        >>> next(calibration.batches()).inputs["x"].shape  # [tasks * B, ...]
        (8, 3)
    """
    if targets is not None and (missing := examples.keys() - targets.keys()):
        raise InputError(f"targets of task {min(missing)!r} are missing; ask its expert too")
    learning, held_out_index = {}, {}
    for position, (task, data) in enumerate(examples.items()):
        size = max(1, round(held_out * len(data)))
        if len(data) - size < batch_size:
            raise InputError(
                f"calibration data of task {task!r}: {len(data)} example(s), {size} of them held "
                f"out, leave fewer than the {batch_size} of one batch; give more, or lower "
                "learning.batch_size"
            )
        order = np.random.default_rng([seed, 0, position]).permutation(len(data))
        # Held-out examples of like length share a batch, so that less is computed on padding; they
        # need not be mixed.
        lengths = data.padded_lengths()[order[:size]]
        held_out_index[task] = order[:size][np.argsort(lengths, kind="stable")]
        learning[task] = np.sort(order[size:])
    require_joinable(examples)
    if targets is None:
        targets = {task: StoredTargets(data) for task, data in examples.items()}
    return Calibration(learning, held_out_index, examples, batch_size, seed, targets)
