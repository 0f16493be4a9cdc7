"""Examples of a task as model inputs: their interface, and parts and sums of them."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from adamerge_jax.errors import InputError
from adamerge_jax.models.images_in_text import COUNT, PIXELS, SIZES

if TYPE_CHECKING:
    from adamerge_jax.data.answers import Answers

log = logging.getLogger(__name__)


EndOfText = Literal["append", "leave"]
"""A language model's end of text: `append` where it is to be predicted, `leave` where it is not."""


class Cut(NamedTuple):
    """The examples that are longer than texts may be.

    Attributes:
        examples: True for each example that is cut, `[N]`.
        max_length: The tokens that are left of it.
    """

    examples: Bool[np.ndarray, " N"]
    max_length: int


class Examples(ABC):
    """Examples of one task.

    Attributes:
        labels: Class index of each example, `[N]`, or of each word, `[N, W]`; or 0 or 1 for each
            label that it may have, `[N, C]`; or numbers, `[N, R]`; None where there are none.
        by_class: True where labels are 0 or 1 for each class.
        class_names: Names of the classes as the data set gives them, or None.
        names_have_order: False where the classes are those of a column of names, whose order says
            nothing.
        cut: The examples that are cut, or None where that cannot be.
        end_of_text: The end of a language model's examples; None for other models.
        are_conversations: True for conversations in a chat template.
        answers: The responses that a language model's own can be compared with; None where there
            are none.
        texts: The number of texts that a sentence embedder's example has: 1, or 2 of pairs.
        scores: The score of each pair, `[N]`, more for texts that are more alike, or None.
        partners: The number of each pair's second text, `[N]`, one for all pairs with the same one;
            None where examples are no pairs.
    """

    labels: Int[np.ndarray, "N ..."] | Float[np.ndarray, "N R"] | None = None
    by_class: bool = False
    class_names: list[str] | None = None
    names_have_order: bool = True
    cut: Cut | None = None
    end_of_text: EndOfText | None = None
    are_conversations: bool = False
    answers: Answers | None = None
    texts: int = 1
    scores: Float[np.ndarray, " N"] | None = None
    partners: Int[np.ndarray, " N"] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    def padded_length(self, index: Int[np.ndarray, " B"]) -> int:
        """Returns the tokens that chosen examples are padded to; 0 where inputs have one shape."""
        return 0

    def padded_lengths(self) -> Int[np.ndarray, " N"]:
        """Returns the tokens that each example alone is padded to."""
        return np.array([self.padded_length(np.array([i])) for i in range(len(self))])

    @abstractmethod
    def take(self, index: Int[np.ndarray, " B"], length: int) -> dict[str, np.ndarray]:
        """Returns model inputs of the chosen examples, `[B, ...]`, texts padded to `length`."""

    def take_labels(
        self, index: Int[np.ndarray, " B"], length: int
    ) -> Int[np.ndarray, "B ..."] | None:
        """Returns the labels of the chosen examples.

        Returns:
            The class index of each, `[B]`, or None where there are no labels. For a language
            model the token that each of `length` positions is to predict, `[B, T]`, or
            `NOT_PREDICTED`; for words the class of each at its first token. Of labels that do not
            exclude each other 0 or 1, `[B, C]`; or numbers, `[B, R]`.
        """
        return None if self.labels is None else self.labels[index]

    def take_counted(
        self, index: Int[np.ndarray, " B"], length: int
    ) -> Bool[np.ndarray, "B T"] | None:
        """Returns True for the tokens that words are classified by; None for other problems."""
        return None

    def take_ends(self, index: Int[np.ndarray, " B"], length: int) -> Bool[np.ndarray, "B T"]:
        """Returns True for the positions of a language model that predict an end."""
        return np.zeros((len(index), length), bool)

    def take_prompts(self, index: Int[np.ndarray, " B"], length: int) -> Bool[np.ndarray, "B T"]:
        """Returns True for the positions of a language model behind which a prompt goes on.

        Positions within the tokens that all prompts begin with are False.
        """
        return np.zeros((len(index), length), bool)


COMPLETED = {"attention_mask": np.ones_like, "token_type_ids": np.zeros_like}
"""Inputs that a text may lack, and the functions that make them of its token ids: without a mask
nothing is padding, without types all are 0."""


def tell_cut(examples: Examples, name: str) -> None:
    """Warns of the examples that are cut.

    Args:
        examples: The examples that are used.
        name: Their name in the message.
    """
    if examples.cut is not None and examples.cut.examples.any():
        log.warning(
            "%s: %d of %d examples are cut to max_length=%d tokens",
            name,
            examples.cut.examples.sum(),
            len(examples),
            examples.cut.max_length,
        )


def sorted_batches(
    examples: Examples, batch_size: int
) -> Iterator[tuple[Int[np.ndarray, " n"], dict[str, np.ndarray]]]:
    """Yields all examples in batches of one size, those of like length together to pad little.

    Yields:
        The indices of n examples, and model inputs `[batch_size, ...]`, of which the first n count:
        the first batch repeats some of its own, which are the shortest.
    """
    order = np.argsort(examples.padded_lengths(), kind="stable")
    cuts = range(len(order) % batch_size or batch_size, len(order), batch_size)
    for index in np.split(order, cuts) if len(order) else []:
        full = np.resize(index, batch_size)
        yield index, examples.take(full, examples.padded_length(full))


class Subset(Examples):
    """A part of other examples."""

    def __init__(self, examples: Examples, index: Int[np.ndarray, " N"]):
        self._examples = examples
        self._index = index
        self.class_names = examples.class_names
        self.names_have_order = examples.names_have_order
        self.by_class = examples.by_class
        self.labels = None if examples.labels is None else examples.labels[index]
        self.end_of_text = examples.end_of_text
        self.are_conversations = examples.are_conversations
        self.answers = examples.answers and examples.answers.subset(index)
        self.texts = examples.texts
        self.scores = None if examples.scores is None else examples.scores[index]
        self.partners = None if examples.partners is None else examples.partners[index]
        if examples.cut is not None:
            self.cut = Cut(examples.cut.examples[index], examples.cut.max_length)

    @classmethod
    def draw(cls, examples: Examples, limit: int, seed: int) -> Examples:
        """Draws at most `limit` of the examples at random, in their order."""
        if limit >= len(examples):
            return examples
        return cls(examples, drawn(len(examples), limit, seed))

    def __len__(self) -> int:
        return len(self._index)

    def padded_length(self, index: Int[np.ndarray, " B"]) -> int:
        return self._examples.padded_length(self._index[index])

    def take(self, index: Int[np.ndarray, " B"], length: int) -> dict[str, np.ndarray]:
        return self._examples.take(self._index[index], length)

    def take_labels(
        self, index: Int[np.ndarray, " B"], length: int
    ) -> Int[np.ndarray, "B ..."] | None:
        return self._examples.take_labels(self._index[index], length)

    def take_counted(
        self, index: Int[np.ndarray, " B"], length: int
    ) -> Bool[np.ndarray, "B T"] | None:
        return self._examples.take_counted(self._index[index], length)

    def take_ends(self, index: Int[np.ndarray, " B"], length: int) -> Bool[np.ndarray, "B T"]:
        return self._examples.take_ends(self._index[index], length)

    def take_prompts(self, index: Int[np.ndarray, " B"], length: int) -> Bool[np.ndarray, "B T"]:
        return self._examples.take_prompts(self._index[index], length)


def drawn(size: int, limit: int, seed: int) -> Int[np.ndarray, " N"]:
    """Returns the indices of at most `limit` of so many examples, drawn at random, ascending."""
    return np.sort(np.random.default_rng(seed).permutation(size)[:limit])


class Concatenated(Examples):
    """The examples of several sets, one set after the other."""

    def __init__(self, parts: Sequence[Examples]):
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _places(self, index: Int[np.ndarray, " B"]) -> list[tuple[Examples, np.ndarray]]:
        """Returns the set of each example and its index there, an array of one."""
        positions = np.searchsorted(self._starts, index, side="right") - 1
        offsets = index - self._starts[positions]
        return [(self._parts[part], offsets[[row]]) for row, part in enumerate(positions)]

    def padded_length(self, index: Int[np.ndarray, " B"]) -> int:
        return max(part.padded_length(offset) for part, offset in self._places(index))

    def take(self, index: Int[np.ndarray, " B"], length: int) -> dict[str, np.ndarray]:
        return joined([part.take(offset, length) for part, offset in self._places(index)])


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Joins model inputs of several sets of examples, one behind the other.

    A mask or token types that only some have are completed for the others.

    Args:
        parts: Inputs `[B, ...]` by name, of the same shapes but for B.
    """
    names = dict.fromkeys(name for part in parts for name in part)
    whole = [completed(part, names) for part in with_as_many_images(parts)]
    return {name: np.concatenate([part[name] for part in whole]) for name in names}


def with_as_many_images(parts: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """Returns model inputs in which all conversations have places for as many images.

    Args:
        parts: Inputs `[B, ...]` by name; those of other models stay as they are.
    """
    with_images = [part for part in parts if COUNT in part and PIXELS in part]
    most = max((part[PIXELS].shape[1] for part in with_images), default=0)
    filled = []
    for part in parts:
        inputs = dict(part)
        if COUNT in part and most:
            for name in (PIXELS, SIZES):
                if name in with_images[0]:
                    like = with_images[0][name]
                    empty = np.zeros((len(part[COUNT]), 0, *like.shape[2:]), like.dtype)
                    inputs.setdefault(name, empty)
            given = inputs[PIXELS]
            if given.shape[1] < most:
                missing = [(0, 0), (0, most - given.shape[1]), *[(0, 0)] * (given.ndim - 2)]
                inputs[PIXELS] = np.pad(given, missing)
        filled.append(inputs)
    return filled


def completed(inputs: Mapping[str, np.ndarray], names: Iterable[str]) -> dict[str, np.ndarray]:
    """Returns inputs with all of these names, as far as they can be made of the token ids."""
    complete = dict(inputs)
    for name in names:
        if name not in complete and name in COMPLETED and "input_ids" in complete:
            complete[name] = COMPLETED[name](complete["input_ids"])
    return complete


def require_joinable(examples: Mapping[str, Examples]) -> None:
    """Refuses tasks whose examples cannot share a batch.

    Args:
        examples: The examples by task, at least one of each.

    Raises:
        InputError: Two tasks differ in the names or the shapes of their inputs.
    """
    first = np.array([0])
    length = max(data.padded_length(first) for data in examples.values())
    taken = {task: data.take(first, length) for task, data in examples.items()}
    names = dict.fromkeys(name for part in taken.values() for name in part)
    filled = with_as_many_images(list(taken.values()))
    whole = {task: completed(part, names) for task, part in zip(taken, filled, strict=True)}
    for name in names:
        shapes = {task: part[name].shape[1:] for task, part in whole.items() if name in part}
        task, shape = next(iter(shapes.items()))
        for other in whole:
            if other not in shapes:
                raise InputError(
                    f"calibration data of task {other!r} has no {name!r}, that of task {task!r} "
                    "has; tasks share batches, so give it for every task or for none"
                )
            if shapes[other] != shape:
                raise InputError(
                    f"calibration data: an example's {name} has shape {shape} in task {task!r} "
                    f"and {shapes[other]} in task {other!r}; tasks share batches, so give all "
                    "tasks arrays of one shape"
                )


def padded(
    rows: Sequence[Sequence[int]], length: int, filler: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Returns rows filled up to `length` at their end, and a mask with 1 where there is a token."""
    filled = np.full((len(rows), length), filler, np.int32)
    mask = np.zeros((len(rows), length), np.int32)
    for position, row in enumerate(rows):
        filled[position, : len(row)] = row
        mask[position, : len(row)] = 1
    return filled, mask


def bucket_length(length: int) -> int:
    """Returns the shortest of 16, 24, 32, 48, 64, 96, 128, ... that holds `length` tokens."""
    size = 16
    while size < length:
        size += size // 2 if size & (size - 1) == 0 else size // 3
    return size
