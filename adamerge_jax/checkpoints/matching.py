"""Which tensor of a checkpoint is which parameter of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from adamerge_jax.checkpoints.finite import require_finite
from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.errors import InputError, and_more
from adamerge_jax.parameter_names import matches

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Checkpoints converted from TensorFlow, bert-base-uncased among them, name LayerNorm's parameters
# as TensorFlow does. (LayerScale has a gamma too, which stays a gamma.)
_LEGACY_ENDINGS = {
    "LayerNorm.gamma": "LayerNorm.weight",
    "LayerNorm.beta": "LayerNorm.bias",
}

_PARAMETER_DTYPES = tuple(
    np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
)

# Values of two tensors that are in memory at once while they are compared.
_COMPARED_VALUES = 2**22

_TOKEN_EMBEDDINGS = (
    "*word_embeddings.weight",
    "*token_embedding.weight",
    "*embed_tokens.weight",
    "*wte.weight",
    "shared.weight",
    "lm_head.weight",
)

# Config fields that decide a parameter's shape or what is computed with it. Many leave every
# shape as it is (the number of heads, the activation), so shapes alone cannot tell.
_ARCHITECTURE_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "image_size",
    "patch_size",
    "num_channels",
    "pooler_output_size",
    "hidden_act",
    "activation",
    "activation_function",
    "pooler_act",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rms_norm_eps",
    "qkv_bias",
    "attention_bias",
    "mlp_bias",
    "position_embedding_type",
    "sinusoidal_pos_embds",
    "rope_parameters",
    "partial_rotary_factor",
    "sliding_window",
    "layer_types",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "hidden_activation",
    "tie_word_embeddings",
    "scale_decoder_outputs",
    "feed_forward_proj",
    "relative_attention_max_distance",
    "num_decoder_layers",
    "is_decoder",
    "add_cross_attention",
)

# Where a config has one of these, positions are computed and not looked up in a table: the number
# of them that it says is advice, and fine-tuning changes it.
_COMPUTED_POSITIONS = ("rope_parameters", "rope_theta", "relative_attention_num_buckets")


@dataclass(frozen=True, eq=False)
class MatchedCheckpoint:
    """A checkpoint whose tensors are known by the model's own names.

    Attributes:
        checkpoint: The checkpoint that the tensors are read from.
        role: What it is in the merge, for messages: `base`, `expert 'trec'`.
        names: The name in the file of every parameter that the checkpoint has.
        extra: The tensors that are no parameter of the model, by their name in the file.
        copies: The parameters that the file has twice, by the name of the second tensor.
    """

    checkpoint: Checkpoint
    role: str
    names: Mapping[str, str] = field(repr=False)
    extra: tuple[str, ...]
    copies: Mapping[str, str] = field(default_factory=dict, repr=False)

    def read(self, name: str) -> np.ndarray:
        """Reads one parameter, in the dtype that it is stored in.

        Raises:
            InputError: It has NaN or infinite values.
        """
        array = self.checkpoint.read(self.names[name])
        require_finite(array, tensor=name, checkpoint=self.checkpoint, role=self.role)
        return array

    def identity(self) -> str:
        """A fingerprint of its contents."""
        return self.checkpoint.identity()

    def has_factors(self, name: str) -> bool:
        """Whether a parameter's task vector is stored as factors: a whole model has none."""
        return False

    def low_rank(self, name: str) -> None:
        """The factors of a parameter's task vector: a whole model has none."""
        return None

    def changes(self, name: str) -> bool:
        """Whether a parameter may differ from the base's: any may."""
        return name in self.names

    def dtype(self, name: str) -> np.dtype:
        """The dtype that a parameter is stored in."""
        return self.checkpoint.tensors[self.names[name]].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter."""
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

    A tensor is found under its own name, under that name without a prefix (`bert.`: what
    `BertModel` saves lacks it, what `BertForSequenceClassification` saves has it), or under the
    legacy `LayerNorm.gamma` and `LayerNorm.beta`.

    Args:
        checkpoint: The checkpoint to look in.
        expected: The shape of every parameter, by name; layers are not stacked.
        role: What the checkpoint is in the merge, for messages: `base`, `expert 'trec'`.
        prefixes: Prefixes of expected names that the checkpoint may lack.
        optional: Patterns of the parameters that may be missing.
        ignored: Patterns of tensors in the checkpoint that are no parameters, such as
            `*.position_ids`.
        second_names: Names of tensors, ignored ones too, in which the checkpoint may hold
            parameters that it lacks under their own, by those.
        allow_extra: Whether the checkpoint may have tensors that are not expected; they are
            listed in the result.

    Returns:
        The checkpoint, known by the names in `expected`.

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
    found = MatchedCheckpoint(
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
    wrong = [name for name in names if found.shape(name) != tuple(expected[name])]
    if wrong:
        raise InputError(_wrong_shape(found, wrong, expected))
    integers = [name for name in names if found.dtype(name) not in _PARAMETER_DTYPES]
    if integers:
        raise InputError(
            f"{where}: {integers[0]} is stored as {found.dtype(integers[0])}"
            f"{and_more(len(integers) - 1)}, expected float32, float16 or bfloat16; undo its "
            "quantisation and save it again"
        )
    if found.extra and not allow_extra:
        raise InputError(
            f"{where} has {found.extra[0]}{and_more(len(found.extra) - 1)}, which is no parameter "
            "of this architecture; check that it is a fine-tune of the base model"
        )
    return found


def find_names(
    in_file: Iterable[str], expected: Mapping[str, tuple[int, ...]], prefixes: Sequence[str] = ()
) -> dict[str, str]:
    """The name in a file of every parameter that the file has, by the parameter's own name.

    Args:
        in_file: Names of a file's tensors.
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


def require_same_architecture(base: Checkpoint, expert: Checkpoint, *, role: str) -> None:
    """Refuses an expert whose configuration is that of another network than the base's.

    A model and a part of it go together: a CLIP checkpoint with one of its vision tower alone.

    Args:
        base: The base model.
        expert: The checkpoint to compare with it.
        role: What that checkpoint is in the merge, for the message: `expert 'trec'`.

    Raises:
        InputError: With the first field that differs, and both of its values.
    """
    where = f"{role} ({expert.source})"
    base_parts, expert_parts = _parts(base.config), _parts(expert.config)
    shared = [part for part in base_parts if part in expert_parts]
    if not shared:
        raise InputError(
            f"{where} has model_type {expert.config.model_type!r}, the base ({base.source}) has "
            f"{base.config.model_type!r}; an expert must be fine-tuned from the base"
        )
    for part in shared:
        for name in ("vocab_size", *_ARCHITECTURE_FIELDS):
            of_base = _field(base_parts[part], name)
            of_expert = _field(expert_parts[part], name)
            # A field that only one of them has came with another version of transformers.
            if of_base is None or of_expert is None or of_base == of_expert:
                continue
            if name == "vocab_size":
                raise InputError(_resized_vocabulary(where, "vocab_size", of_expert, of_base))
            raise InputError(
                f"{where} has {name} {of_expert!r} in its config.json, the base ({base.source}) "
                f"has {of_base!r}; an expert must be fine-tuned from the base"
            )


def require_tied(model: MatchedCheckpoint, name: str, output: str) -> None:
    """Refuses an output layer that differs from the embeddings although the config ties them.

    Args:
        model: The checkpoint, whose values are read where it has both.
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


def _field(config: PretrainedConfig, name: str) -> Any:
    """What a config says of its architecture in a field; None where it says nothing."""
    if name == "max_position_embeddings" and any(
        getattr(config, field, None) is not None for field in _COMPUTED_POSITIONS
    ):
        return None
    return _without_legacy_type(getattr(config, name, None))


def _without_legacy_type(value: Any) -> Any:
    """Settings of rotary positions without the name that `rope_type` had in older configs."""
    if not isinstance(value, dict):
        return value
    repeated = "type" in value and value.get("rope_type") == value["type"]
    return {
        key: _without_legacy_type(own)
        for key, own in value.items()
        if not (repeated and key == "type")
    }


def _current(name: str) -> str:
    for legacy, current in _LEGACY_ENDINGS.items():
        if name.endswith(legacy):
            return name.removesuffix(legacy) + current
    return name


def _candidates(
    name: str, prefixes: Sequence[str], expected: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """The names that a parameter may have in a file; the one to prefer comes last."""
    for prefix in prefixes:
        bare = name.removeprefix(prefix)
        if bare not in expected:
            yield bare
    yield name


def _parts(config: PretrainedConfig) -> dict[str, PretrainedConfig]:
    """The configuration and those of its parts (text, vision, ...), by their model type."""
    parts = [getattr(config, name) for name in config.sub_configs]
    return {part.model_type: part for part in [config, *parts]}


def _wrong_shape(
    found: MatchedCheckpoint, wrong: Sequence[str], expected: Mapping[str, tuple[int, ...]]
) -> str:
    where = f"{found.role} ({found.checkpoint.source})"
    for name in wrong:
        shape = found.shape(name)
        if (
            matches(name, _TOKEN_EMBEDDINGS)
            and len(shape) == len(expected[name]) == 2
            and shape[1] == expected[name][1]
        ):
            return _resized_vocabulary(where, name, shape[0], expected[name][0])
    name = wrong[0]
    return (
        f"{where}: {name} has shape {found.shape(name)}, expected {tuple(expected[name])}"
        f"{and_more(len(wrong) - 1)}; all checkpoints of a merge must be fine-tuned from one base "
        "model"
    )


def _resized_vocabulary(where: str, name: str, size: Any, expected: Any) -> str:
    return (
        f"{where} has a resized vocabulary: {name} says {size} tokens where {expected} are "
        f"expected; save it again after model.resize_token_embeddings({expected}), or leave it out"
    )
