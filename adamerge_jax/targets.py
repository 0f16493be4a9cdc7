"""What calibration examples are compared with: computed once, kept, and taken batch by batch."""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import IO

import numpy as np
from jaxtyping import Float, Int

from adamerge_jax.data import Examples, sorted_batches
from adamerge_jax.objectives import Needs, Targets

MEMORY_BYTES = 2**30
"""Hidden states of one task over this size are kept on disk."""

AskExpert = Callable[
    [dict[str, np.ndarray]],
    tuple[Float[np.ndarray, "B C"], Mapping[int, Float[np.ndarray, "B T H"]]],
]
"""From model inputs to the expert's logits and its hidden states by layer."""


class StoredTargets:
    """Targets of all examples of one task.

    Attributes:
        labels: Class indices `[N]`, or None.
        expert_logits: `[N, C]`, or None.
    """

    def __init__(
        self,
        labels: Int[np.ndarray, " N"] | None = None,
        expert_logits: Float[np.ndarray, "N C"] | None = None,
        hidden_states: "_HiddenStates | None" = None,
    ):
        self.labels = labels
        self.expert_logits = expert_logits
        self._hidden_states = hidden_states

    def take(self, index: Int[np.ndarray, " B"], length: int) -> Targets:
        """The targets of the chosen examples, texts padded to `length` tokens with zeros."""
        return Targets(
            None if self.expert_logits is None else self.expert_logits[index],
            {} if self._hidden_states is None else self._hidden_states.take(index, length),
            None if self.labels is None else self.labels[index],
        )


def ask_expert(
    ask: AskExpert,
    examples: Examples,
    needs: Needs,
    *,
    batch_size: int,
    memory_bytes: int = MEMORY_BYTES,
) -> StoredTargets:
    """Asks a task's expert for what the objective needs of its examples.

    Args:
        ask: The expert, compiled.
        examples: N examples; their labels are kept too.
        needs: Which targets.
        batch_size: Examples per call; the last call repeats some.
        memory_bytes: Hidden states over this size go to a temporary file.
    """
    logits: np.ndarray | None = None
    states = _HiddenStates(memory_bytes) if needs.hidden_states else None
    for index, inputs in sorted_batches(examples, batch_size):
        batch_logits, hidden = ask(inputs)
        if logits is None:
            logits = np.empty((len(examples), batch_logits.shape[1]), batch_logits.dtype)
        logits[index] = batch_logits[: len(index)]
        if states is not None:
            lengths = _lengths(inputs, next(iter(hidden.values())).shape[1])
            states.add(index, hidden, lengths)
    return StoredTargets(examples.labels, logits if needs.expert_logits else None, states)


def _lengths(inputs: Mapping[str, np.ndarray], positions: int) -> Int[np.ndarray, " B"]:
    """Positions of each example that are no padding behind it."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return np.full(len(next(iter(inputs.values()))), positions)
    return positions - np.argmax(mask[:, ::-1] == 1, axis=1)


class _HiddenStates:
    """Hidden states of the positions that are no padding, one example after the other.

    They are kept in memory up to a limit, then in a temporary file, which the system removes with
    the process.
    """

    def __init__(self, memory_bytes: int):
        self._parts: dict[int, np.ndarray] = {}
        self._memory_bytes = memory_bytes
        self._kept_bytes = 0
        self._file: IO[bytes] | None = None
        self._in_file: dict[int, tuple[int, tuple[int, ...], np.dtype]] = {}
        self._layers: list[int] = []

    def add(
        self,
        index: Iterable[int],
        hidden: Mapping[int, Float[np.ndarray, "B T H"]],
        lengths: Int[np.ndarray, " B"],
    ) -> None:
        """Keeps the hidden states of some examples."""
        self._layers = list(hidden)
        stacked = np.stack([np.asarray(hidden[layer]) for layer in self._layers], axis=1)
        for row, example in enumerate(index):
            states = np.ascontiguousarray(stacked[row, :, : lengths[row]])
            if self._kept_bytes + states.nbytes <= self._memory_bytes:
                self._kept_bytes += states.nbytes
                self._parts[int(example)] = states
                continue
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as this)
            self._in_file[int(example)] = (self._file.tell(), states.shape, states.dtype)
            self._file.write(states.tobytes())

    def take(
        self, index: Int[np.ndarray, " B"], length: int
    ) -> dict[int, Float[np.ndarray, "B T H"]]:
        """By layer, padded with zeros to `length` positions, or as they are where it is 0."""
        rows = [self._row(int(example)) for example in index]
        length = length or rows[0].shape[1]
        first = rows[0]
        padded = np.zeros((len(first), len(rows), length, first.shape[2]), first.dtype)
        for position, row in enumerate(rows):
            padded[:, position, : row.shape[1]] = row
        return dict(zip(self._layers, padded, strict=True))

    def _row(self, example: int) -> Float[np.ndarray, "layers T H"]:
        if example in self._parts:
            return self._parts[example]
        assert self._file is not None
        offset, shape, dtype = self._in_file[example]
        self._file.seek(offset)
        data = self._file.read(int(np.prod(shape)) * dtype.itemsize)
        self._file.seek(0, 2)
        return np.frombuffer(data, dtype).reshape(shape)
