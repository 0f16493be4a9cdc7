"""What calibration examples are compared with: computed once, kept, and taken batch by batch."""

import functools
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from adamerge_jax.data.examples import Examples, sorted_batches
from adamerge_jax.devices import fetch
from adamerge_jax.objectives import Needs, Targets, TopTokens

MEMORY_BYTES = 2**30
"""What an expert says of the positions of one task's texts is kept on disk beyond this size."""

AskExpert = Callable[[dict[str, np.ndarray]], tuple[Array, Mapping[int, Float[Array, "B T H"]]]]
"""From model inputs to the expert's logits, `[B, C]` or `[B, T, V]`, and its hidden states."""


class StoredTargets:
    """Targets of all examples of one task.

    Attributes:
        examples: Whose labels are targets too.
        expert_logits: `[N, C]`, or None.
    """

    def __init__(
        self,
        examples: Examples,
        expert_logits: Float[np.ndarray, "N C"] | None = None,
        by_position: "_ByPosition | None" = None,
    ):
        self.examples = examples
        self.expert_logits = expert_logits
        self._by_position = by_position

    def take(self, index: Int[np.ndarray, " B"], length: int) -> Targets:
        """The targets of the chosen examples, texts padded to `length` tokens with zeros."""
        labels = self.examples.take_labels(index, length)
        logits = None if self.expert_logits is None else self.expert_logits[index]
        if self._by_position is None:
            return Targets(logits, {}, labels)
        found = self._by_position.take(index, length)
        top = None
        if _TOKENS in found:
            top = TopTokens(found.pop(_TOKENS), found.pop(_LOG_PROBABILITIES))
        return Targets(found.pop(_LOGITS, logits), found, labels, expert_top=top)


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
        ask: The expert, compiled: from model inputs `[B, ...]` by name to its logits, `[B, C]` or
            `[B, T, V]`, and its hidden states `[B, T, H]` by layer.
        examples: N examples; their labels are targets too.
        needs: Which targets.
        batch_size: Examples per call; the last call repeats some.
        memory_bytes: What is said of positions goes to a temporary file beyond this size.

    Returns:
        The targets of all N examples, for `calibrate`.

    Examples:
        >>> import numpy as np
        >>> from adamerge_jax import ArrayExamples, ask_expert, objectives
        >>> weights = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])  # an expert of 3 classes
        >>> examples = ArrayExamples({"x": np.eye(2)})
        >>> def ask(inputs):
        ...     return inputs["x"] @ weights.T, {}  # logits [B, C], no hidden states
        >>> targets = ask_expert(ask, examples, objectives.logit_alignment().needs, batch_size=2)
        >>> targets.expert_logits.tolist()
        [[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]
    """
    logits: np.ndarray | None = None
    by_position = _ByPosition(memory_bytes)
    for index, inputs in sorted_batches(examples, batch_size):
        batch_logits, hidden = ask(inputs)
        said: dict[Any, Array] = {layer: hidden[layer] for layer in needs.hidden_states}
        if needs.expert_logits and batch_logits.ndim == 3:
            said |= _of_tokens(batch_logits, needs.top_tokens)
        elif needs.expert_logits:
            if logits is None:
                logits = np.empty((len(examples), batch_logits.shape[1]), batch_logits.dtype)
            logits[index] = fetch(batch_logits)[: len(index)]
        if said:
            arrays = {key: fetch(array) for key, array in said.items()}
            lengths = _lengths(inputs, next(iter(arrays.values())).shape[1])
            by_position.add(index, arrays, lengths)
    return StoredTargets(examples, logits, by_position if by_position.filled else None)


_LOGITS, _TOKENS, _LOG_PROBABILITIES = "logits", "tokens", "log_probabilities"


def _of_tokens(logits: Float[Array, "B T V"], top: int | None) -> dict[str, Array]:
    """What is kept of a language model's logits: all, or the likely tokens."""
    if top is None:
        return {_LOGITS: logits}
    values, tokens = most_likely(logits, min(top, logits.shape[-1]))
    return {_TOKENS: tokens, _LOG_PROBABILITIES: values}


@functools.partial(jax.jit, static_argnums=1)
def most_likely(
    logits: Float[Array, "B T V"], count: int
) -> tuple[Float[Array, "B T k"], Int[Array, "B T k"]]:
    """Log-probabilities of the `count` likeliest tokens of each position, and which they are."""
    return jax.lax.top_k(jax.nn.log_softmax(logits.astype(jnp.float32)), count)


def _lengths(inputs: Mapping[str, np.ndarray], positions: int) -> Int[np.ndarray, " B"]:
    """Positions of each example that are no padding behind it."""
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    if mask is None:
        return np.full(len(next(iter(inputs.values()))), positions)
    return positions - np.argmax(mask[:, ::-1] == 1, axis=1)


class _ByPosition:
    """Arrays with one row per position that is no padding, one example after the other.

    They are kept in memory up to a limit, then in a temporary file, which the system removes with
    the process.

    Attributes:
        filled: Whether there is anything.
    """

    def __init__(self, memory_bytes: int):
        self.filled = False
        self._positions = 0
        self._kept: dict[int, dict[Any, np.ndarray]] = {}
        self._memory_bytes = memory_bytes
        self._kept_bytes = 0
        self._file: IO[bytes] | None = None
        self._in_file: dict[int, dict[Any, tuple[int, tuple[int, ...], np.dtype]]] = {}

    def add(
        self,
        index: Iterable[int],
        arrays: Mapping[Any, Float[np.ndarray, "B T ..."]],
        lengths: Int[np.ndarray, " B"],
    ) -> None:
        """Keeps the arrays of some examples."""
        self.filled = True
        # Where examples have one shape it is that of all; what is kept of each may be shorter.
        self._positions = next(iter(arrays.values())).shape[1]
        for row, example in enumerate(index):
            own = {
                key: np.ascontiguousarray(array[row, : lengths[row]])
                for key, array in arrays.items()
            }
            size = sum(array.nbytes for array in own.values())
            if self._kept_bytes + size <= self._memory_bytes:
                self._kept_bytes += size
                self._kept[int(example)] = own
                continue
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as this)
            places = self._in_file.setdefault(int(example), {})
            for key, array in own.items():
                places[key] = (self._file.tell(), array.shape, array.dtype)
                self._file.write(array.tobytes())

    def take(
        self, index: Int[np.ndarray, " B"], length: int
    ) -> dict[Any, Float[np.ndarray, "B T ..."]]:
        """Padded with zeros to `length` positions, or to as many as were given where it is 0."""
        rows = [self._read(int(example)) for example in index]
        taken = {}
        for key, first in rows[0].items():
            shape = (len(rows), length or self._positions, *first.shape[1:])
            taken[key] = np.zeros(shape, first.dtype)
            for position, row in enumerate(rows):
                taken[key][position, : len(row[key])] = row[key]
        return taken

    def _read(self, example: int) -> Mapping[Any, Float[np.ndarray, "T ..."]]:
        if example in self._kept:
            return self._kept[example]
        assert self._file is not None
        arrays = {}
        for key, (offset, shape, dtype) in self._in_file[example].items():
            self._file.seek(offset)
            data = self._file.read(int(np.prod(shape)) * dtype.itemsize)
            arrays[key] = np.frombuffer(data, dtype).reshape(shape)
        self._file.seek(0, 2)
        return arrays
