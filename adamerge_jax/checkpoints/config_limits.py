"""The limits of a model's config: a config.json comes from strangers and may describe no model.

The fields are checked as they stand in the file, before `transformers` allocates by them, and then
against each other, when the config has its defaults.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from adamerge_jax.checkpoints.finite import is_number
from adamerge_jax.checkpoints.safetensors_file import TensorInfo
from adamerge_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers")

_EXPERTS = ("num_experts", "num_local_experts")

_COUNTS = (
    *_LAYERS,
    *_EXPERTS,
    *("vocab_size", "type_vocab_size", "max_position_embeddings", "num_channels"),
    *("hidden_size", "intermediate_size", "projection_dim", "d_model", "d_kv", "d_ff"),
    *("num_attention_heads", "num_key_value_heads", "num_heads", "head_dim", "sliding_window"),
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
    *("original_max_position_embeddings", "sliding_window_pattern"),
    *("num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"),
    *("local_attention", "num_register_tokens"),
)
"""Fields that hold a whole number of at least 1."""

_ABSENT = {"deberta-v2": ("type_vocab_size",)}
"""Counts that are 0 in models of a type that lack the part."""

_REQUIRED = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads"),
)
"""Counts that a model of every kind that has them must have."""

_CLASSES = "num_labels"
"""The field of the number of classes."""

_LEAST = {_CLASSES: 0, "position_buckets": -1}
"""Fields that hold a whole number, and the least one: of a model without a head, or buckets."""

_SIDES = ("image_size", "patch_size")
"""Fields that hold a whole number of at least 1, or two of them."""

_POSITIVE = (
    *("rope_theta", "rope_local_base_freq", "query_pre_attn_scalar"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
    *("factor", "low_freq_factor", "high_freq_factor"),
)
"""Fields that hold a number above 0, those of rotary positions included."""

_NOT_NEGATIVE = ("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "norm_eps")
"""Fields that hold a number of at least 0."""

_SWITCHES = (
    *("tie_word_embeddings", "scale_decoder_outputs", "is_encoder_decoder", "is_decoder"),
    *("add_cross_attention", "is_causal", "use_bidirectional_attention", "use_sliding_window"),
    *("attention_bias", "mlp_bias", "qkv_bias", "is_gated_act", "share_att_key"),
    *("use_swiglu_ffn", "use_mask_token", "vision_use_head"),
)
"""Fields that hold true or false."""

_NAMES = (
    *("model_type", "hidden_act", "hidden_activation", "feed_forward_proj", "dense_act_fn"),
    *("position_embedding_type", "problem_type", "rope_type", "norm_rel_ebd"),
)
"""Fields that hold a text."""

_GROUPS = ("rope_parameters", "rope_scaling", "id2label", "label2id", "auto_map")
"""Fields that hold fields."""

_WORKINGS = ("attribute_map", "sub_configs", "sub_configs_defaults")
"""Attributes of the class of configs that decide the meaning of others."""

_PART_ENDINGS = ("_config", "_config_dict", "rope_parameters", "rope_scaling", "_attention")
"""Endings of the names of fields that hold fields of the model: of a tower, of rotary positions."""

_NO_PARTS = ("quantization_config", "compression_config")

_MOST = 2**31 - 1
"""The largest number of entries along an axis of an array."""

_USUAL_LAYERS, _USUAL_CLASSES = 2**10, 2**16
"""Numbers that a config may claim whatever its weights are: names are compared with them later."""


def require_possible(
    fields: Mapping[str, Any],
    where: str,
    tensors: Mapping[str, TensorInfo],
    *,
    usual: bool = True,
) -> None:
    """Refuses fields of a config that no model can have.

    Args:
        fields: The fields of a config.json.
        where: The file, for messages.
        tensors: The tensors of the checkpoint: many layers need as many tensors, and many classes
            or experts of a mixture a tensor with as many rows.
        usual: If False, the model is of an architecture without a family here, in which a count may
            be 0, or a list with one for each stage, and the number of positions 1200.0.

    Raises:
        InputError: With the first such field, its value, and the values that are possible.
    """
    rows = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    for name, value in _all_fields(_without_absent_window(fields)):
        if value is None:
            continue  # a default, or nothing of the kind
        field = name.rpartition(".")[2]
        if not usual and _is_unusual(field, value):
            continue
        if value == 0 and field in _ABSENT.get(str(fields.get("model_type")), ()):
            continue
        if expected := _expected(field, value):
            raise InputError(f"{where}: {name} is {_shown(value)}; expected {expected}")
        excess = None
        if field in _LAYERS and value > max(len(tensors), _USUAL_LAYERS):
            excess = f"have {len(tensors)} tensors"
        if field in _EXPERTS and value > max(rows, _USUAL_LAYERS):
            excess = f"have no more than {rows} rows"
        if field == _CLASSES and value > max(rows, _USUAL_CLASSES):
            excess = f"have no more than {rows} rows"
        if excess:
            raise InputError(
                f"{where}: {name} is {value}, but the weights beside it {excess}; config and "
                "weights must belong together"
            )


def require_plain(fields: Mapping[str, Any], where: str, config_class: type) -> None:
    """Refuses fields that would replace the workings of the class of configs.

    A config takes every field of the file for an attribute, and its methods are attributes too.

    Args:
        fields: The fields of a config.json.
        where: The file, for messages.
        config_class: The base class of all configs.

    Raises:
        InputError: With the first such field.
    """
    for name, _ in _all_fields(fields):
        field = name.rpartition(".")[2]
        if field in _WORKINGS or callable(getattr(config_class, field, None)):
            raise InputError(
                f"{where}: {name!r} is no field of a model but a part of the class of configs; "
                "remove it"
            )


def require_consistent(config: PretrainedConfig, where: str) -> None:
    """Refuses a config whose fields contradict each other.

    Args:
        config: The config, with its defaults.
        where: The file, for messages.

    Raises:
        InputError: With the fields and their values.
    """
    for part in [config, *(getattr(config, name) for name in config.sub_configs)]:
        if absent := [name for name in _REQUIRED if getattr(part, name, 1) is None]:
            raise InputError(f"{where}: {absent[0]} is null; expected a whole number above 0")
        sizes = {
            name: getattr(part, name, None)
            for name in (
                *("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
                *("num_hidden_layers", "image_size", "patch_size"),
            )
        }
        width, heads, shared, features, layers, image, patch = sizes.values()
        if width and heads and not features and width % heads:
            raise _contradiction(where, sizes, "hidden_size", "num_attention_heads", "a multiple")
        if heads and shared and heads % shared:
            raise _contradiction(
                where, sizes, "num_attention_heads", "num_key_value_heads", "a multiple"
            )
        features = features or (width // heads if width and heads else 0)
        if getattr(part, "rope_parameters", None) and features % 2:
            raise InputError(
                f"{where}: heads have {features} features (head_dim, or hidden_size divided by "
                "num_attention_heads); rotary positions need an even number"
            )
        padding, tokens = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if isinstance(padding, int) and tokens and padding >= tokens:
            raise InputError(
                f"{where}: pad_token_id is {padding}, vocab_size is {tokens}; padding must be one "
                "of the tokens, or transformers cannot make the model"
            )
        kinds = getattr(part, "layer_types", None)
        if kinds is not None and layers is not None and len(kinds) != layers:
            raise InputError(
                f"{where}: layer_types has {len(kinds)} entries, num_hidden_layers is {layers}; "
                "expected one for each layer"
            )
        if image and patch and np.less(image, patch).any():
            raise _contradiction(where, sizes, "image_size", "patch_size", "at least one times")
        chosen = getattr(part, "num_experts_per_tok", None)
        for count in _EXPERTS:
            if chosen and getattr(part, count, None) and chosen > getattr(part, count):
                numbers = {"num_experts_per_tok": chosen, count: getattr(part, count)}
                raise _contradiction(where, numbers, "num_experts_per_tok", count, "at most that")


def _all_fields(fields: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the fields of a config and of the parts inside it, under their dotted names."""
    for name, value in fields.items():
        yield before + name, value
        if isinstance(value, dict) and name.endswith(_PART_ENDINGS) and name not in _NO_PARTS:
            yield from _all_fields(value, f"{before}{name}.")


def _without_absent_window(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns fields without a `sliding_window` of 0, as a Qwen2-MoE that has none is saved."""
    is_absent = fields.get("sliding_window") == 0 and fields.get("use_sliding_window") is False
    return {
        name: _without_absent_window(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if not (is_absent and name == "sliding_window")
    }


def _expected(field: str, value: Any) -> str | None:
    """Returns the values that a field may have, or None if it has one of them."""
    if field in _COUNTS:
        return None if _is_count(value) else "a whole number above 0 and below 2**31"
    if field in _LEAST:
        is_least = value == _LEAST[field] and not isinstance(value, bool)
        return (
            None
            if is_least or value == 0 or _is_count(value)
            else f"a whole number of at least {_LEAST[field]} and below 2**31"
        )
    if field in _SIDES:
        sides = value if isinstance(value, list) and len(value) == 2 else [value]
        return None if all(map(_is_count, sides)) else "a whole number of pixels, or two"
    if field in _POSITIVE:
        return None if is_number(value) and value > 0 else "a finite number above 0"
    if field in _NOT_NEGATIVE:
        return None if is_number(value) and value >= 0 else "a finite number of at least 0"
    if field in _SWITCHES:
        return None if isinstance(value, bool) else "true or false"
    if field in _NAMES:
        return None if isinstance(value, str) else "a text"
    if field in _GROUPS:
        return None if isinstance(value, dict) else "a group of fields"
    if field in ("layer_types", "architectures"):
        are_names = isinstance(value, list) and all(isinstance(name, str) for name in value)
        return None if are_names else "a list of texts"
    return None


def _is_unusual(field: str, value: Any) -> bool:
    """Returns True for the values of fields that only other architectures have."""
    if field == "num_hidden_layers" and isinstance(value, dict):
        return all(map(_is_count, value.values()))  # those of an LXMERT's parts
    if field == "use_bidirectional_attention" and value in ("all", "vision"):
        return True  # a Gemma 4's
    counts = value if isinstance(value, list) else [value]
    if field == "max_position_embeddings" and isinstance(value, float) and value.is_integer():
        return _is_count(int(value))  # MusicFlamingo's is 1200.0
    if field in _SWITCHES and isinstance(value, list):
        return all(isinstance(switch, bool) for switch in value)
    if field in (*_COUNTS, *_SIDES) and value != [] and (isinstance(value, list) or value == 0):
        return all(count == 0 or _is_count(count) for count in counts if count is not None)
    return False


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST


def _shown(value: Any) -> str:
    """Returns a value on one line, or its kind if it holds others."""
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "a group of fields"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _contradiction(
    where: str, sizes: Mapping[str, Any], first: str, second: str, relation: str
) -> InputError:
    return InputError(
        f"{where}: {first} is {sizes[first]}, {second} is {sizes[second]}; {first} must be "
        f"{relation} of {second}"
    )
