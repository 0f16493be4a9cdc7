"""Targets from the experts: computed once for all calibration examples, taken batch by batch."""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import IO

import jax
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Shaped

from adamerge_jax.data.examples import Concatenated, Examples, Subset, sorted_batches
from adamerge_jax.devices import fetch
from adamerge_jax.heads.losses import spread_of
from adamerge_jax.objectives import CrossTaskTargets, Targets, TargetSpec
from adamerge_jax.objectives.distributions import likely_tokens

MEMORY_BYTES = 2**30
"""The size beyond which the targets by position of one task's texts are kept on disk."""

AskExpert = Callable[[dict[str, np.ndarray]], tuple[Array, Mapping[int, Float[Array, "B T H"]]]]
"""From model inputs to the expert's logits, `[B, C]` or `[B, T, V]`, and its hidden states."""


def expert_targets(
    spec: TargetSpec,
    logits: Float[Array, "B ... C"],
    hidden_states: Mapping[int, Float[Array, "B T H"]],
) -> Targets:
    """Returns the targets that are computed from an expert's outputs.

    A pure function: the planner calls it on abstract arrays. For a new kind of target, add a field
    to `Targets`, a way to ask for it to `TargetSpec`, and its computation here.

    Args:
        spec: The targets asked for.
        logits: The expert's logits, `[B, C]` or `[B, T, V]`, or its embeddings, `[B, texts, H]`.
        hidden_states: Its hidden states by layer.

    Returns:
        Arrays with a leading axis over the examples; those with three axes or more have one row
        for each position, `[B, T, ...]`, but for embeddings.
    """
    expert_logits, expert_top = logits if spec.expert_logits else None, None
    if spec.expert_logits and spec.top_tokens is not None and logits.ndim == 3:
        expert_logits, expert_top = (
            None,
            likely_tokens(logits, min(spec.top_tokens, logits.shape[-1])),
        )
    chosen_states = {layer: hidden_states[layer] for layer in spec.hidden_states}
    embeddings = logits if spec.expert_embeddings else None
    return Targets(
        expert_logits,
        chosen_states,
        expert_top=expert_top,
        expert_embeddings=embeddings,
    )


def has_positions(targets: Targets, spec: TargetSpec) -> list[bool]:
    """Returns for each leaf of targets, None among them, True if it has one row a position."""
    whole = targets._replace(expert_embeddings=None)
    if spec.by_label:
        whole = whole._replace(expert_logits=None)
    return [leaf is not None and leaf.ndim > 2 for leaf in _flatten(whole)[0]]


class StoredTargets:
    """The targets of all examples of one task.

    Attributes:
        examples: The examples, whose labels and partners are targets too.
    """

    def __init__(
        self,
        examples: Examples,
        whole: Targets | None = None,
        by_position: "_ByPosition | None" = None,
        spread: Float[np.ndarray, " R"] | None = None,
    ):
        """Joins the parts of the targets.

        Args:
            examples: The N examples.
            whole: The targets, arrays `[N, ...]`, None in place of each one that is kept by
                position.
            by_position: The arrays by position, by their numbers among the leaves of the targets.
            spread: The standard deviation of the expert's numbers, where it is a target.
        """
        self._spread = spread
        self.examples = examples
        self._whole = Targets() if whole is None else whole
        self._leaves, self._structure = _flatten(self._whole)
        self._by_position = by_position

    @property
    def expert_logits(self) -> Float[np.ndarray, "N C"] | None:
        """The expert's logits of all examples; None if there are none, or one row a position."""
        return self._whole.expert_logits

    def first(self, examples: Examples) -> "StoredTargets":
        """Returns the targets of the first examples alone.

        Args:
            examples: The first M examples.
        """
        leaves = [None if leaf is None else leaf[: len(examples)] for leaf in self._leaves]
        whole = jax.tree.unflatten(self._structure, leaves)
        return StoredTargets(examples, whole, self._by_position, self._spread)

    @property
    def has_expert(self) -> bool:
        """True if an expert has been asked for them."""
        return self._by_position is not None or any(leaf is not None for leaf in self._leaves)

    def take(self, index: Int[np.ndarray, " B"], length: int) -> Targets:
        """Returns the targets of B examples, texts padded to `length` tokens with zeros."""
        leaves = [None if leaf is None else leaf[index] for leaf in self._leaves]
        if self._by_position is not None:
            for number, array in self._by_position.take(index, length).items():
                leaves[number] = array
        targets = jax.tree.unflatten(self._structure, leaves)
        partners = self.examples.partners
        return targets._replace(
            labels=self.examples.take_labels(index, length),
            partners=None if partners is None else partners[index],
            counted=self.examples.take_counted(index, length),
            expert_spread=None if self._spread is None else np.tile(self._spread, (len(index), 1)),
        )


def ask_expert(
    ask: AskExpert,
    examples: Examples,
    spec: TargetSpec,
    *,
    batch_size: int,
    memory_bytes: int = MEMORY_BYTES,
) -> StoredTargets:
    """Computes the targets that a task's expert gives for its examples.

    Args:
        ask: The expert, compiled: from model inputs `[B, ...]` by name to its logits, `[B, C]` or
            `[B, T, V]`, and its hidden states `[B, T, H]` by layer.
        examples: N examples; their labels are targets too.
        spec: The targets asked for.
        batch_size: Examples per call; the last call repeats some.
        memory_bytes: The size beyond which arrays by position go to a temporary file.

    Returns:
        The targets of all N examples, for `calibrate`.

    Examples:
        >>> import numpy as np
        >>> from adamerge_jax import ArrayExamples, ask_expert, objectives
        >>> weights = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])  # an expert of 3 classes
        >>> examples = ArrayExamples({"x": np.eye(2)})
        >>> def ask(inputs):
        ...     return inputs["x"] @ weights.T, {}  # logits [B, C], no hidden states
        >>> spec = objectives.logit_alignment().target_spec
        >>> targets = ask_expert(ask, examples, spec, batch_size=2)
        >>> targets.expert_logits.tolist()
        [[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]
    """
    whole: list[np.ndarray | None] = []
    by_position = _ByPosition(memory_bytes)
    for index, inputs in sorted_batches(examples, batch_size):
        batch = expert_targets(spec, *ask(inputs))
        leaves, structure = _flatten(batch)
        whole = whole or [
            None
            if leaf is None or by_row
            else np.empty((len(examples), *leaf.shape[1:]), leaf.dtype)
            for leaf, by_row in zip(leaves, has_positions(batch, spec), strict=True)
        ]
        rows = {}
        for number, leaf in enumerate(leaves):
            if whole[number] is not None:
                whole[number][index] = fetch(leaf)[: len(index)]
            elif leaf is not None:
                rows[number] = fetch(leaf)
        if rows:
            lengths = _lengths(inputs, next(iter(rows.values())).shape[1])
            by_position.add(index, rows, lengths)
    stored = jax.tree.unflatten(structure, whole)
    spread = None
    if spec.expert_spread and stored.expert_logits is not None:
        spread = spread_of(stored.expert_logits).astype(np.float32)
    return StoredTargets(examples, stored, by_position if by_position.filled else None, spread)


def _flatten(targets: Targets) -> tuple[list[Array | None], PyTree]:
    """Returns the leaves of targets, None where one is not there, and their structure."""
    return jax.tree.flatten(targets, is_leaf=lambda leaf: leaf is None)


class CrossTaskLogits:
    """The logits of a task's expert on the examples of each other task.

    An expert is asked about some of these examples; they stand for all that are learned from.
    """

    def __init__(
        self,
        expert_logits: Mapping[str, Float[np.ndarray, "N C"]],
        learning: Mapping[str, Int[np.ndarray, " M"]],
    ):
        """Weighs the examples that the expert was asked about.

        Args:
            expert_logits: By other task, NaN for the examples that the expert was not asked about.
            learning: Indices of the examples that coefficients are learned from, by task.
        """
        self._logits, self._weights = {}, {}
        for task, logits in expert_logits.items():
            asked = ~np.isnan(logits[:, 0])
            self._logits[task] = np.where(asked[:, None], logits, 0)
            self._weights[task] = (asked / asked[learning[task]].mean()).astype(np.float32)

    def take(self, chosen: Mapping[str, Int[np.ndarray, " B"]]) -> CrossTaskTargets:
        """Returns the targets of a batch.

        Args:
            chosen: Indices of the batch's examples by task.
        """
        logits, weights = (
            np.stack([arrays[task][chosen[task]] for task in arrays], axis=1)
            for arrays in (self._logits, self._weights)
        )
        return CrossTaskTargets(logits, weights)


def ask_cross_task(
    logits_of: Callable[[Examples], Float[np.ndarray, "N C"]],
    examples: Mapping[str, Examples],
    task: str,
    learning: Mapping[str, Int[np.ndarray, " M"]],
    *,
    limit: int,
    seed: int,
) -> CrossTaskLogits:
    """Computes the logits of a task's expert on the calibration examples of all other tasks.

    Args:
        logits_of: The expert: from examples to its logits.
        examples: The calibration examples by task.
        task: The task whose expert is asked.
        learning: Indices of the examples that coefficients are learned from, by task.
        limit: The number of these of each other task, drawn at random, that it is asked about.
        seed: Decides on the draws.
    """
    others = {other: data for other, data in examples.items() if other != task}
    generator = np.random.default_rng([seed, 5, list(learning).index(task)])
    asked = {other: generator.permutation(learning[other])[:limit] for other in others}
    # All at once, so that texts of like length share a batch across tasks.
    subsets = [Subset(data, asked[other]) for other, data in others.items()]
    logits = logits_of(Concatenated(subsets))
    by_task = {}
    for other, data in others.items():
        rows, logits = np.split(logits, [len(asked[other])])
        by_task[other] = np.full((len(data), rows.shape[1]), np.nan, rows.dtype)
        by_task[other][asked[other]] = rows
    return CrossTaskLogits(by_task, learning)


def _lengths(inputs: Mapping[str, np.ndarray], positions: int) -> Int[np.ndarray, " B"]:
    """Returns the number of each example's positions up to the padding behind it."""
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
        self._memory: dict[int, dict[int, np.ndarray]] = {}
        self._memory_bytes = memory_bytes
        self._used_bytes = 0
        self._file: IO[bytes] | None = None
        self._places: dict[int, dict[int, tuple[int, tuple[int, ...], np.dtype]]] = {}

    def add(
        self,
        index: Iterable[int],
        arrays: Mapping[int, Shaped[np.ndarray, "B T ..."]],
        lengths: Int[np.ndarray, " B"],
    ) -> None:
        """Adds the arrays of some examples.

        Args:
            index: The examples.
            arrays: Their arrays, by any key; the same keys in every call.
            lengths: The number of positions to be kept of each example.
        """
        self.filled = True
        # Where examples have one shape it is that of all; what is kept of each may be shorter.
        self._positions = next(iter(arrays.values())).shape[1]
        for row, example in enumerate(index):
            parts = {
                key: np.ascontiguousarray(array[row, : lengths[row]])
                for key, array in arrays.items()
            }
            size = sum(part.nbytes for part in parts.values())
            if self._used_bytes + size <= self._memory_bytes:
                self._used_bytes += size
                self._memory[int(example)] = parts
                continue
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as this)
            places = self._places.setdefault(int(example), {})
            for key, part in parts.items():
                places[key] = (self._file.tell(), part.shape, part.dtype)
                self._file.write(part.tobytes())

    def take(
        self, index: Int[np.ndarray, " B"], length: int
    ) -> dict[int, Shaped[np.ndarray, "B T ..."]]:
        """Returns the arrays of some examples by key, padded with zeros.

        Args:
            index: The examples.
            length: T; 0 for as many positions as were given.
        """
        rows = [self._read(int(example)) for example in index]
        arrays = {}
        for key, first in rows[0].items():
            shape = (len(rows), length or self._positions, *first.shape[1:])
            arrays[key] = np.zeros(shape, first.dtype)
            for position, row in enumerate(rows):
                arrays[key][position, : len(row[key])] = row[key]
        return arrays

    def _read(self, example: int) -> Mapping[int, Shaped[np.ndarray, "T ..."]]:
        if example in self._memory:
            return self._memory[example]
        assert self._file is not None
        arrays = {}
        for key, (offset, shape, dtype) in self._places[example].items():
            self._file.seek(offset)
            data = self._file.read(int(np.prod(shape)) * dtype.itemsize)
            arrays[key] = np.frombuffer(data, dtype).reshape(shape)
        self._file.seek(0, 2)
        return arrays
