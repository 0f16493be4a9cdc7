"""The config.json of a merge: the base's file with the few fields that the merge changed.

A file is copied field by field and never written through the class of a config, which would put it
into the dialect of the `transformers` that runs here. Older versions, and engines built on them,
then miss fields without a word: with `rope_parameters` alone they rotate by a base of 10,000. For
the same reason `transformers_version` stays: it tells readers the dialect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adamerge_jax.checkpoints.config_file import Fields

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_OF_OLD_WEIGHTS = (
    *("quantization_config", "quantization", "compression_config", "sparsity_config"),
    *("_name_or_path", "auto_map", "custom_pipelines"),
)
"""Fields about the weights that a config came with, or about Python files, which never travel."""

_OF_OLD_HEAD = ("id2label", "label2id", "num_labels", "problem_type", "finetuning_task")

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

_TOKENIZER_CLASS = "tokenizer_class"

_DTYPES = ("dtype", "torch_dtype")
"""The field of the weights' dtype in `transformers` 5, and in version 4 and before."""


def without_old_weights(fields: Mapping[str, Any]) -> Fields:
    """Returns the fields of a config without those that described the weights beside it.

    Quantisation and compression are undone by the merge, and the Python files of `auto_map` are
    not copied. The parts of the config (`text_config`, `vision_config`) are treated alike.
    """
    return {
        name: without_old_weights(value) if _is_part(name, value) else value
        for name, value in fields.items()
        if name not in _OF_OLD_WEIGHTS
    }


def without_head(fields: Mapping[str, Any], architecture: str | None) -> Fields:
    """Returns the fields of a config for its model without a head.

    Args:
        fields: The fields.
        architecture: The class of that model; None where `transformers` has none, as for PP-LCNet.
    """
    left_out = _OF_OLD_HEAD if architecture else (*_OF_OLD_HEAD, "architectures")
    bare = {name: value for name, value in fields.items() if name not in left_out}
    return bare | ({"architectures": [architecture]} if architecture else {})


def with_head(fields: Mapping[str, Any], architecture: str, classes: Sequence[str]) -> Fields:
    """Returns the fields of a config for a classifier.

    Args:
        fields: The fields.
        architecture: The class of the classifier.
        classes: The names of its classes.
    """
    return without_head(fields, architecture) | {
        "id2label": {str(index): name for index, name in enumerate(classes)},
        "label2id": {name: index for index, name in enumerate(classes)},
    }


def with_dtype(fields: Mapping[str, Any], dtype: str) -> Fields:
    """Returns the fields of a config for weights of a dtype, under the name that the file uses."""
    changed = {
        name: _with_dtype_of_part(value, dtype) if _is_part(name, value) else value
        for name, value in fields.items()
    }
    used = [name for name in _DTYPES if name in fields]
    return changed | dict.fromkeys(used or [_DTYPES[not _is_recent(fields)]], dtype)


_OLDER_ROTARY_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""Kinds of rotary positions of `transformers` 4; it has no models with others."""


def readable_by_older_versions(fields: Mapping[str, Any]) -> Fields:
    """Returns the fields of a config with what `transformers` 4 must find to compute the same.

    Version 5 writes the base and the scaling of rotary positions as `rope_parameters`, which
    version 4 does not read, and the output layer of a T5 as `scale_decoder_outputs`. The older
    names are added, with the same values; version 5 reads both.
    """
    added: Fields = {}
    rotary = fields.get("rope_parameters")
    if rotary and "rope_theta" not in fields and not fields.get("rope_scaling"):
        # Without rotary positions a type of layer has None.
        by_type = {kind: rotary[kind] or {} for kind in rotary if kind.endswith("_attention")}
        settings = dict(by_type.get("full_attention", {}) if by_type else rotary)
        kind = settings.get("rope_type", "default")
        if kind not in _OLDER_ROTARY_KINDS:
            return dict(fields)
        added["rope_theta"] = settings.pop("rope_theta", None)
        if kind != "default":
            added["rope_scaling"] = settings
        added["rope_local_base_freq"] = by_type.get("sliding_attention", {}).get("rope_theta")
    if fields.get("scale_decoder_outputs") is False:
        added["tie_word_embeddings"] = False
    return dict(fields) | {name: value for name, value in added.items() if value is not None}


def tokenizer_readable_by_older_versions(fields: Mapping[str, Any]) -> Fields:
    """Returns the settings of a tokenizer under the names that `transformers` 4 has for them.

    Version 5 reads both: its class `TokenizersBackend` is the `PreTrainedTokenizerFast` of before,
    and its list `extra_special_tokens` the `additional_special_tokens`.
    """
    older = dict(fields)
    if older.get("tokenizer_class") == "TokenizersBackend":
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(older.get("extra_special_tokens"), list):
        older["additional_special_tokens"] = older.pop("extra_special_tokens")
    return older


def special_tokens(
    fields: Mapping[str, Any], config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> Fields:
    """Returns the ids of the special tokens of a model, as its config.json has them.

    Args:
        fields: The fields of the model's config.json.
        config: Its config, which has defaults for what the file leaves out.
        tokenizer: Its tokenizer. Its tokens count where the config names others, as the config of
            a base does for an adapter that was trained with a token of its own.
    """
    ids = {name: fields.get(name, getattr(config, name, None)) for name in _TOKEN_IDS}
    for name, stated in ids.items():
        of_tokenizer = getattr(tokenizer, name)
        is_usable = of_tokenizer is not None and of_tokenizer < config.vocab_size
        if stated is not None and is_usable and not _names_all(stated, of_tokenizer):
            ids[name] = of_tokenizer
    return ids


def with_special_tokens(fields: Mapping[str, Any], ids: Mapping[str, Any]) -> Fields:
    """Returns the fields of generation settings with other ids of special tokens.

    A field stays where it names the same tokens among others: an `eos_token_id` of several ends a
    text at each of them.

    Args:
        fields: The fields.
        ids: The ids of special tokens, as `special_tokens` returns them.
    """
    return dict(fields) | {
        name: value
        for name, value in ids.items()
        if value is not None and not _names_all(fields.get(name), value)
    }


def with_tokenizer(
    fields: Mapping[str, Any], of_owner: Mapping[str, Any], ids: Mapping[str, Any]
) -> Fields:
    """Returns the fields of a config for the tokenizer of another model.

    Args:
        fields: The fields.
        of_owner: The fields of that model's config, which may name the tokenizer's class.
        ids: The ids of special tokens, as `special_tokens` returns them.
    """
    present = {name: value for name, value in ids.items() if name in fields or value is not None}
    changed = dict(fields) | present
    if _TOKENIZER_CLASS in of_owner:
        return changed | {_TOKENIZER_CLASS: of_owner[_TOKENIZER_CLASS]}
    changed.pop(_TOKENIZER_CLASS, None)
    return changed


def _with_dtype_of_part(fields: Mapping[str, Any], dtype: str) -> Fields:
    """Returns the fields of a part of a config, with the dtype where it has one of its own."""
    return dict(fields) | {name: dtype for name in _DTYPES if name in fields}


def _names_all(stated: Any, ids: Any) -> bool:
    """Returns True if the one id or the ids in a field include others."""
    alternatives, needed = (i if isinstance(i, list) else [i] for i in (stated, ids))
    return all(token_id in alternatives for token_id in needed)


def _is_part(name: str, value: Any) -> bool:
    return isinstance(value, dict) and name.endswith("_config")


def _is_recent(fields: Mapping[str, Any]) -> bool:
    """Returns True for a file that `transformers` 5 or a later version wrote."""
    major = str(fields.get("transformers_version", "")).partition(".")[0]
    return major.isdecimal() and int(major) >= 5
