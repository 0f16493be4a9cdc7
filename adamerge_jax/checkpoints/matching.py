"""The tensors of a checkpoint, matched with the parameters of a model by their names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType

import ml_dtypes
import numpy as np

from adamerge_jax.checkpoints.finite import require_finite
from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.quantization import quantized, require_unquantized
from adamerge_jax.checkpoints.renamed import current_name, renamed
from adamerge_jax.checkpoints.safetensors_file import TensorInfo
from adamerge_jax.checkpoints.wrappers import unwrapped
from adamerge_jax.errors import InputError, and_more
from adamerge_jax.parameter_names import matches

PARAMETER_DTYPES = tuple(
    np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
)

# The number of values of two tensors that are compared at once.
_COMPARED_VALUES = 2**22

# The number of values at the beginning of a tensor that tell most fine-tunes from their base.
_FIRST_VALUES = 1024

TOKEN_EMBEDDINGS = (
    "*word_embeddings.weight",
    "*word_embedding.weight",
    "*tok_embeddings.weight",
    "*token_embedding.weight",
    "*embed_tokens.weight",
    "*embed_in.weight",
    "*wte.weight",
    "shared.weight",
    "lm_head.weight",
    "embed_out.weight",
)
"""Patterns of the names of embedding tables of tokens, and of the output layer."""


@dataclass(frozen=True, eq=False)
class MatchedCheckpoint:
    """A checkpoint whose tensors have the names of the model's parameters.

    Attributes:
        checkpoint: The checkpoint that the tensors are read from.
        role: Its role in the merge, for messages: `base`, `expert 'trec'`.
        names: The name in the file of every parameter that the checkpoint has.
        extra: The names in the file of tensors that are no parameter of the model.
        copies: The parameters that the file has twice, by the name of the second tensor.
        left_out: The tokens of its tokenizer that the merge has no rows for.
    """

    checkpoint: Checkpoint
    role: str
    names: Mapping[str, str] = field(repr=False)
    extra: tuple[str, ...]
    copies: Mapping[str, str] = field(default_factory=dict, repr=False)
    left_out: tuple[str, ...] = ()

    def read(self, name: str) -> np.ndarray:
        """Returns one parameter, in the dtype that it is read in.

        Raises:
            InputError: It has NaN or infinite values.
        """
        array = self.checkpoint.read(self.names[name])
        require_finite(array, tensor=name, source=self.checkpoint.source, role=self.role)
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
        """Returns the dtype that a parameter is stored in, or that it is merged in by default."""
        return self.tensor(name).merged_dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a parameter."""
        return self.tensor(name).shape

    def tensor(self, name: str) -> TensorInfo:
        """Returns a parameter's tensor in the files."""
        return self.checkpoint.tensors[self.names[name]]


def match(
    checkpoint: Checkpoint,
    expected: Mapping[str, tuple[int, ...]],
    *,
    role: str,
    prefixes: Sequence[str] = (),
    optional: Sequence[str] = (),
    ignored: Sequence[str] = (),
    second_names: Mapping[str, Sequence[str]] = MappingProxyType({}),
    allow_extra: bool = False,
    fit: Callable[[MatchedCheckpoint], MatchedCheckpoint] = lambda matched: matched,
) -> MatchedCheckpoint:
    """Finds the model's parameters among the tensors of a checkpoint.

    A tensor may have the parameter's name, that name without a prefix (`bert.`, which files of
    `BertModel` lack and files of `BertForSequenceClassification` have), or the legacy name
    `LayerNorm.gamma` or `LayerNorm.beta`, or the one of another version of `transformers`
    (`language_model.model.` for `model.language_model.`). Names that a training loop's wrapper
    changed (`module.`, `_orig_mod.`) are read without the wrapper.

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
        fit: Gives tensors that were found the shapes that are expected, where it can.

    Returns:
        The checkpoint, with the names in `expected`.

    Raises:
        InputError: A tensor is missing, unexpected, empty, of another shape or not of floating
            point, or the checkpoint is quantised or holds an adapter that was not merged.
    """
    where = f"{role} ({checkpoint.source})"
    require_unquantized(checkpoint.tensors, checkpoint.config_fields, where)
    _require_merged(checkpoint, where)

    def find(in_file: Collection[str]) -> dict[str, str]:
        tensors = [name for name in in_file if not matches(name, ignored)]
        names = find_names(tensors, expected, prefixes)
        names |= renamed(
            [name for name in expected if name not in names],
            set(tensors) - set(names.values()),
            checkpoint.config.model_type,
        )
        for name, others in second_names.items():
            second = next((other for other in others if other in in_file), None)
            if name not in names and second is not None:
                names[name] = second
        return names

    required = [name for name in expected if not matches(name, optional)]
    checkpoint, names = _without_wrappers(checkpoint, find, required)
    tensors = [name for name in checkpoint.tensors if not matches(name, ignored)]
    extra = sorted(set(tensors) - set(names.values()))
    matched = MatchedCheckpoint(
        checkpoint,
        role,
        names,
        extra=tuple(extra),
        copies={
            second: name
            for name, others in second_names.items()
            for second in others
            if second in checkpoint.tensors.keys() - extra and names.get(name, second) != second
        },
    )
    missing = [name for name in required if name not in names]
    if missing:
        called = f", and has tensors called {extra[0]}{and_more(len(extra) - 1)}" if extra else ""
        raise InputError(
            f"{where} lacks {missing[0]}{and_more(len(missing) - 1)}{called}; all checkpoints of a "
            "merge must be fine-tuned from one base model"
        )
    require_filled({matched.names[name]: matched.shape(name) for name in names}, where)
    matched = fit(matched)
    wrong = [name for name in names if matched.shape(name) != tuple(expected[name])]
    if wrong:
        raise InputError(_wrong_shape(matched, wrong, expected))
    integers = [name for name in names if matched.dtype(name) not in PARAMETER_DTYPES]
    if integers:
        raise quantized(
            where,
            f"{integers[0]} stored as {matched.dtype(integers[0])}{and_more(len(integers) - 1)}",
            None,
            checkpoint.config_fields,
        )
    if matched.extra and not allow_extra:
        raise InputError(
            f"{where} has {matched.extra[0]}{and_more(len(matched.extra) - 1)}, which is no "
            "parameter of this architecture; check that it is a fine-tune of the base model"
        )
    return matched


def require_filled(shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuses tensors without values, as a process leaves them that has a part of a model only.

    Args:
        shapes: The shapes of parameters, none of which is empty in a whole model.
        where: The checkpoint, for messages: its role and source.

    Raises:
        InputError: With the first empty tensor.
    """
    if empty := [name for name, shape in shapes.items() if not prod(shape)]:
        raise InputError(
            f"{where} has no values in {empty[0]}, whose shape is {shapes[empty[0]]}"
            f"{and_more(len(empty) - 1)}: it was saved by one of several processes that had a part "
            "each, as DeepSpeed ZeRO-3 does; save it gathered (zero_to_fp32.py, or "
            "stage3_gather_16bit_weights_on_model_save)"
        )


def _require_merged(checkpoint: Checkpoint, where: str) -> None:
    """Refuses the weights of a PEFT model, in which factors stand beside what they change."""
    for name in checkpoint.tensors:
        if ".lora_A." in name or ".base_layer." in name:
            raise InputError(
                f"{where} has {name}: a PEFT model that was not merged; save it after "
                "merge_and_unload(), or save its adapter alone with PEFT's save_pretrained"
            )


def _without_wrappers(
    checkpoint: Checkpoint,
    find: Callable[[Collection[str]], dict[str, str]],
    required: Sequence[str],
) -> tuple[Checkpoint, dict[str, str]]:
    """Takes wrappers off the names of a checkpoint's tensors until all parameters are there.

    Args:
        checkpoint: The checkpoint.
        find: Returns the tensor of each parameter that is among tensors of the given names.
        required: The names of parameters that it must have.

    Returns:
        The checkpoint under the names with which most of these are there, and the name of each
        parameter's tensor.
    """
    names, tensors, most = {}, checkpoint.tensors, -1
    for in_file in unwrapped(checkpoint.tensors):
        candidate = find(in_file)
        count = sum(name in candidate for name in required)
        if count > most:
            names, most = candidate, count
            tensors = {name: checkpoint.tensors[tensor] for name, tensor in in_file.items()}
        if most == len(required):
            break
    return dataclasses.replace(checkpoint, tensors=tensors), names


def find_names(
    in_file: Iterable[str], expected: Mapping[str, tuple[int, ...]], prefixes: Sequence[str] = ()
) -> dict[str, str]:
    """Returns the name in a file of every parameter that the file has, by the parameter's name.

    Args:
        in_file: The names of the file's tensors.
        expected: The shape of every parameter, by name.
        prefixes: Prefixes of expected names that the file may lack, or have before them.
    """
    by_current_name = {current_name(name): name for name in in_file}
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
    same = tensors[table].shape == tensors[output].shape and not any(
        _differences((model.checkpoint, table), (model.checkpoint, output))
    )
    if not same:
        raise InputError(
            f"{model.role} ({model.checkpoint.source}) has an {output} that differs from {table}, "
            "while its config.json says that they are one (tie_word_embeddings true); say false "
            "there and in all models of the merge, or leave this one out"
        )


def differs(model: MatchedCheckpoint, base: MatchedCheckpoint, names: Sequence[str]) -> bool:
    """Returns True if a model differs from the base in one of some parameters.

    The base is compared as it would be stored in the model's dtype. Of models that differ little
    is read: of every tensor its beginning, and whole tensors only if all of these are equal.

    Args:
        model: The model.
        base: The base.
        names: The names of parameters that both have.
    """
    for whole in (False, True):
        for name in names:
            tensors = (model.checkpoint, model.names[name]), (base.checkpoint, base.names[name])
            parts = _differences(*tensors, count=_COMPARED_VALUES if whole else _FIRST_VALUES)
            if any(parts) if whole else next(parts, False):
                return True
    return False


def _differences(
    first: tuple[Checkpoint, str],
    second: tuple[Checkpoint, str],
    count: int = _COMPARED_VALUES,
) -> Iterator[bool]:
    """Yields for part after part of two tensors True if the values differ.

    Args:
        first: A checkpoint and the name of a tensor in it.
        second: Those of a tensor of the same shape, compared in the dtype of the first one.
        count: The number of values that are compared at once.
    """
    dtype = first[0].tensors[first[1]].dtype
    size = prod(first[0].tensors[first[1]].shape)
    for start in range(0, size, count):
        parts = []
        for checkpoint, tensor in (first, second):
            values = np.empty(min(count, size - start), checkpoint.tensors[tensor].dtype)
            checkpoint.read_part(tensor, start, values)
            with np.errstate(over="ignore"):
                parts.append(values.astype(dtype).astype(np.float32))
        yield not np.array_equal(*parts, equal_nan=True)


def _candidates(
    name: str, prefixes: Sequence[str], expected: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """Yields the names that a parameter may have in a file; the preferred one comes last."""
    for prefix in prefixes:
        bare = name.removeprefix(prefix)
        other = prefix + name if bare == name else bare
        if other not in expected:
            yield other
    yield name


def _wrong_shape(
    matched: MatchedCheckpoint, wrong: Sequence[str], expected: Mapping[str, tuple[int, ...]]
) -> str:
    where = f"{matched.role} ({matched.checkpoint.source})"
    for name in wrong:
        shape, wanted = matched.shape(name), expected[name]
        is_table = matches(name, TOKEN_EMBEDDINGS) and len(shape) == len(wanted) == 2
        if is_table and shape[1] == wanted[1]:
            return (
                f"{where} has a resized vocabulary: {name} says {shape[0]} tokens where "
                f"{wanted[0]} are expected; save it again after "
                f"model.resize_token_embeddings({wanted[0]}), or leave it out"
            )
    name = wrong[0]
    shape, wanted = matched.shape(name), tuple(expected[name])
    classes = matched.checkpoint.config.num_labels
    if "classifier" in name and shape[1:] == wanted[1:] and wanted[0] == classes:
        return (
            f"{where} has {shape[0]} classes by {name} and {classes} by its config.json (the names "
            "in id2label, or num_labels; 2 without both); say there how many it has"
        )
    return (
        f"{where}: {name} has shape {shape}, expected {wanted}"
        f"{and_more(len(wrong) - 1)}; all checkpoints of a merge must be fine-tuned from one base "
        "model"
    )
