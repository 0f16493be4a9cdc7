"""The tensors of a checkpoint, matched with the parameters of a model by their names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType

import ml_dtypes
import numpy as np

from adamerge_jax.checkpoints.architecture import resized_vocabulary
from adamerge_jax.checkpoints.finite import require_finite
from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.errors import InputError, and_more
from adamerge_jax.parameter_names import matches

# Checkpoints converted from TensorFlow, bert-base-uncased among them, name LayerNorm's parameters
# as TensorFlow does. (LayerScale has a gamma too, which stays a gamma.)
_LEGACY_ENDINGS = {
    "LayerNorm.gamma": "LayerNorm.weight",
    "LayerNorm.beta": "LayerNorm.bias",
}

_PARAMETER_DTYPES = tuple(
    np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
)

# The number of values of two tensors that are compared at once.
_COMPARED_VALUES = 2**22

_TOKEN_EMBEDDINGS = (
    "*word_embeddings.weight",
    "*token_embedding.weight",
    "*embed_tokens.weight",
    "*wte.weight",
    "shared.weight",
    "lm_head.weight",
)


@dataclass(frozen=True, eq=False)
class MatchedCheckpoint:
    """A checkpoint whose tensors have the names of the model's parameters.

    Attributes:
        checkpoint: The checkpoint that the tensors are read from.
        role: Its role in the merge, for messages: `base`, `expert 'trec'`.
        names: The name in the file of every parameter that the checkpoint has.
        extra: The names in the file of tensors that are no parameter of the model.
        copies: The parameters that the file has twice, by the name of the second tensor.
    """

    checkpoint: Checkpoint
    role: str
    names: Mapping[str, str] = field(repr=False)
    extra: tuple[str, ...]
    copies: Mapping[str, str] = field(default_factory=dict, repr=False)

    def read(self, name: str) -> np.ndarray:
        """Returns one parameter, in the dtype that it is stored in.

        Raises:
            InputError: It has NaN or infinite values.
        """
        array = self.checkpoint.read(self.names[name])
        require_finite(array, tensor=name, checkpoint=self.checkpoint, role=self.role)
        return array

    def identity(self) -> str:
        """Returns a fingerprint of its contents."""
        return self.checkpoint.identity()

    def has_factors(self, name: str) -> bool:
        """Returns False: no task vector of a whole model is stored as factors."""
        return False

    def low_rank(self, name: str) -> None:
        """Returns None: no task vector of a whole model is stored as factors."""
        return None

    def changes(self, name: str) -> bool:
        """Returns True if it has a parameter, which may then differ from the base's."""
        return name in self.names

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype that a parameter is stored in."""
        return self.checkpoint.tensors[self.names[name]].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a parameter."""
        return self.checkpoint.tensors[self.names[name]].shape


def match(
    checkpoint: Checkpoint,
    expected: Mapping[str, tuple[int, ...]],
    *,
    role: str,
    prefixes: Sequence[str] = (),
    optional: Sequence[str] = (),
    ignored: Sequence[str] = (),
    second_names: Mapping[str, str] = MappingProxyType({}),
    allow_extra: bool = False,
) -> MatchedCheckpoint:
    """Finds the model's parameters among the tensors of a checkpoint.

    A tensor may have the parameter's name, that name without a prefix (`bert.`, which files of
    `BertModel` lack and files of `BertForSequenceClassification` have), or the legacy name
    `LayerNorm.gamma` or `LayerNorm.beta`.

    Args:
        checkpoint: The checkpoint to look in.
        expected: The shape of every parameter, by name; layers are not stacked.
        role: The role of the checkpoint in the merge, for messages: `base`, `expert 'trec'`.
        prefixes: Prefixes of expected names that the checkpoint may lack.
        optional: Patterns of the parameters that may be missing.
        ignored: Patterns of tensors in the checkpoint that are no parameters, such as
            `*.position_ids`.
        second_names: Further names, by parameter, of tensors that may hold it, ignored ones
            included; they count if the checkpoint lacks its first name.
        allow_extra: Allows tensors that are not expected; they are listed in the result.

    Returns:
        The checkpoint, with the names in `expected`.

    Raises:
        InputError: A tensor is missing, unexpected, of another shape or not of floating point.
    """
    tensors = [name for name in checkpoint.tensors if not matches(name, ignored)]
    names = find_names(tensors, expected, prefixes)
    names |= {
        name: second
        for name, second in second_names.items()
        if name not in names and second in checkpoint.tensors
    }
    matched = MatchedCheckpoint(
        checkpoint,
        role,
        names,
        extra=tuple(sorted(set(tensors) - set(names.values()))),
        copies={
            second: name
            for name, second in second_names.items()
            if second in checkpoint.tensors and names.get(name, second) != second
        },
    )
    where = f"{role} ({checkpoint.source})"
    missing = [name for name in expected if name not in names and not matches(name, optional)]
    if missing:
        raise InputError(
            f"{where} lacks {missing[0]}{and_more(len(missing) - 1)}; all checkpoints of a merge "
            "must be fine-tuned from one base model"
        )
    wrong = [name for name in names if matched.shape(name) != tuple(expected[name])]
    if wrong:
        raise InputError(_wrong_shape(matched, wrong, expected))
    integers = [name for name in names if matched.dtype(name) not in _PARAMETER_DTYPES]
    if integers:
        raise InputError(
            f"{where}: {integers[0]} is stored as {matched.dtype(integers[0])}"
            f"{and_more(len(integers) - 1)}, expected float32, float16 or bfloat16; undo its "
            "quantisation and save it again"
        )
    if matched.extra and not allow_extra:
        raise InputError(
            f"{where} has {matched.extra[0]}{and_more(len(matched.extra) - 1)}, which is no "
            "parameter of this architecture; check that it is a fine-tune of the base model"
        )
    return matched


def find_names(
    in_file: Iterable[str], expected: Mapping[str, tuple[int, ...]], prefixes: Sequence[str] = ()
) -> dict[str, str]:
    """Returns the name in a file of every parameter that the file has, by the parameter's name.

    Args:
        in_file: The names of the file's tensors.
        expected: The shape of every parameter, by name.
        prefixes: Prefixes of expected names that the file may lack.
    """
    by_current_name = {_current(name): name for name in in_file}
    return {
        name: by_current_name[candidate]
        for name in expected
        for candidate in _candidates(name, prefixes, expected)
        if candidate in by_current_name
    }


def require_tied(model: MatchedCheckpoint, name: str, output: str) -> None:
    """Refuses an output layer that differs from the embeddings although the config ties them.

    Args:
        model: The checkpoint, whose values are read if it has both.
        name: The embedding table, a parameter.
        output: The output layer's name in the file.

    Raises:
        InputError: Their values or their shapes differ.
    """
    table = model.names[name]
    tensors = model.checkpoint.tensors
    if output not in tensors or output == table:
        return
    same = tensors[table].shape == tensors[output].shape
    size = prod(tensors[table].shape)
    for first in range(0, size if same else 0, _COMPARED_VALUES):
        parts = []
        for tensor in (table, output):
            values = np.empty(min(_COMPARED_VALUES, size - first), tensors[tensor].dtype)
            model.checkpoint.read_part(tensor, first, values)
            parts.append(values.astype(np.float32))
        same = same and np.array_equal(*parts, equal_nan=True)
    if not same:
        raise InputError(
            f"{model.role} ({model.checkpoint.source}) has an {output} that differs from {table}, "
            "while its config.json says that they are one (tie_word_embeddings true); say false "
            "there and in all models of the merge, or leave this one out"
        )


def _current(name: str) -> str:
    for legacy, current in _LEGACY_ENDINGS.items():
        if name.endswith(legacy):
            return name.removesuffix(legacy) + current
    return name


def _candidates(
    name: str, prefixes: Sequence[str], expected: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """Yields the names that a parameter may have in a file; the preferred one comes last."""
    for prefix in prefixes:
        bare = name.removeprefix(prefix)
        if bare not in expected:
            yield bare
    yield name


def _wrong_shape(
    matched: MatchedCheckpoint, wrong: Sequence[str], expected: Mapping[str, tuple[int, ...]]
) -> str:
    where = f"{matched.role} ({matched.checkpoint.source})"
    for name in wrong:
        shape = matched.shape(name)
        if (
            matches(name, _TOKEN_EMBEDDINGS)
            and len(shape) == len(expected[name]) == 2
            and shape[1] == expected[name][1]
        ):
            return resized_vocabulary(where, name, shape[0], expected[name][0])
    name = wrong[0]
    return (
        f"{where}: {name} has shape {matched.shape(name)}, expected {tuple(expected[name])}"
        f"{and_more(len(wrong) - 1)}; all checkpoints of a merge must be fine-tuned from one base "
        "model"
    )
