"""Tiny random models of every `model_type` of the installed `transformers`.

    model = tiny_model("qwen3_moe")

A config is made small by its fields, whose names most architectures share: two layers, 32 hidden
units, a vocabulary of 128. Where an architecture refuses the smallest of them, fewer are changed,
until one can be built; a model that stays large is not made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MOST_PARAMETERS = 30_000_000
"""The number of parameters of the largest model that counts as tiny."""

_VOCABULARY = 128

_LAYERS = {
    **dict.fromkeys(
        (
            *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers"),
            *("decoder_layers", "num_decoder_layers", "num_encoder_layers", "num_blocks"),
            *("encoder_num_hidden_layers", "decoder_num_hidden_layers", "decoder_num_layers"),
            *("num_hidden_groups", "memory_attention_num_layers", "resampler_depth"),
        ),
        2,
    ),
    "max_window_layers": 1,
    "first_k_dense_replace": 1,
    "mlp_only_layers": [],
    "num_kv_shared_layers": 0,
}

_WIDTHS = {
    **dict.fromkeys(
        (
            *("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size"),
            *("decoder_hidden_size", "encoder_hidden_size", "projection_dim", "text_hidden_size"),
            *("word_embed_proj_dim", "out_hidden_size", "output_dim", "emb_dim", "width"),
        ),
        32,
    ),
    **dict.fromkeys(
        (
            *("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"),
            *("moe_intermediate_size", "shared_expert_intermediate_size", "mlp_dim", "n_inner"),
            *("ffn_hidden_size", "shared_intermediate_size", "decoder_intermediate_size"),
        ),
        64,
    ),
    **dict.fromkeys(
        (
            *("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads"),
            *("decoder_attention_heads", "attention_heads", "decoder_num_attention_heads"),
        ),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "attention_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    "qk_head_dim": 16,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

_TABLES = {
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "n_vocab", "text_vocab_size"), _VOCABULARY
    ),
    **dict.fromkeys(
        (
            *("max_position_embeddings", "n_positions", "max_source_positions", "seq_length"),
            *("max_target_positions", "context_length", "block_size", "num_position_embeddings"),
        ),
        64,
    ),
}

_LISTS_BY_LAYER = re.compile(
    r"(layer|layers_block|mlp_layer|indexer|block)_types?|no_rope_layers|layers_block_type"
    r"|out_features|out_indices|stage_names|layer_rope_theta"
)
"""Fields with an entry for each layer, which a config makes anew for fewer layers."""

_DEPTHS = ("depths", "blocks_per_stage", "stage_num_blocks", "layers_per_stage")

_SHRINKAGES: tuple[Mapping[str, Any], ...] = (
    _LAYERS | _WIDTHS | _TABLES,
    _LAYERS | _TABLES,
    _LAYERS,
    _TABLES,
    {},
)
"""Settings by field, the smallest models first."""


class NotMadeError(Exception):
    """A model type of which no tiny model can be made, with the reason."""


def model_types() -> list[str]:
    """Returns the model types whose config `transformers` finds by its name, sorted."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


def class_name(model_type: str) -> str:
    """Returns the name of the class for models of a type: a language model's where there is one.

    Raises:
        NotMadeError: No class can be found by the type: it is a part of other models.
    """
    from transformers.models.auto import modeling_auto

    others = [
        name
        for name in dir(modeling_auto)
        if name.endswith("MAPPING_NAMES") and name != "CONFIG_MAPPING_NAMES"
    ]
    for mapping in ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_MAPPING_NAMES", *others):
        if name := getattr(modeling_auto, mapping).get(model_type):
            return name if isinstance(name, str) else name[0]
    raise NotMadeError("a part of other models: no class is found by this type")


def tiny_model(model_type: str, name: str | None = None, *, seed: int = 0) -> PreTrainedModel:
    """Makes a tiny random model in float32, in evaluation mode, with eager attention.

    Args:
        model_type: The `model_type` of its config.
        name: The name of its class in `transformers`; by default `class_name(model_type)`.
        seed: The seed of its weights.

    Raises:
        NotMadeError: With the reason.
    """
    import torch
    import transformers

    model_class = getattr(transformers, name or class_name(model_type))
    reason = "no config is accepted"
    for settings in _SHRINKAGES:
        try:
            config = tiny_config(model_type, settings)
            with torch.device("meta"):
                empty = model_class(config)
        except Exception as error:  # whatever an architecture says of sizes that do not fit
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            continue
        size = sum(parameter.numel() for parameter in empty.parameters())
        if size > MOST_PARAMETERS:
            reason = f"{size / 1e6:.0f} M parameters"
            continue
        torch.manual_seed(seed)
        try:
            return model_class(tiny_config(model_type, settings)).eval()
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    raise NotMadeError(reason)


def tiny_config(model_type: str, settings: Mapping[str, Any] = _SHRINKAGES[0]) -> PretrainedConfig:
    """Returns the default config of a type with small values, in its parts (text, vision) too.

    Args:
        model_type: The `model_type`.
        settings: Values by the names of fields; others stay at their defaults.
    """
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    fields = _shrunk(config_class().to_dict(), settings)
    return config_class.from_dict(fields, attn_implementation="eager")


def _shrunk(fields: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config, or of one of its parts, with small values."""
    shrinks_layers = "num_hidden_layers" in settings
    small = dict(_shrunk_fields(fields, settings))
    if shrinks_layers:
        small = {name: value for name, value in small.items() if not _is_by_layer(name, value)}
    return small


def _is_by_layer(name: str, value: Any) -> bool:
    return isinstance(value, list) and _LISTS_BY_LAYER.fullmatch(str(name)) is not None


def _shrunk_fields(
    fields: Mapping[str, Any], settings: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    largest_id = _VOCABULARY - 1 if "vocab_size" in settings else None
    for name, value in fields.items():
        if not isinstance(name, str):  # ids of labels
            yield name, value
        elif isinstance(value, Mapping):
            yield name, _shrunk(value, settings)
        elif name in settings and _is_size(value):
            new = settings[name]
            if isinstance(value, int):
                yield name, min(value, new)
            else:  # an entry for each of several stages
                yield name, new if isinstance(new, list) else value
        elif "num_hidden_layers" in settings and name in _DEPTHS and isinstance(value, list):
            yield name, [1] * len(value)
        elif largest_id is not None and re.fullmatch(r".*token_(id|index)", name):
            is_outside = isinstance(value, int) and value > largest_id
            yield name, _token_id(name, largest_id) if is_outside else value
        else:
            yield name, value


def _is_size(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, int) and not isinstance(value, bool))


def _token_id(name: str, largest: int) -> int:
    """Returns an id within the vocabulary that few other tokens have, the same on every call."""
    return largest - sum(name.encode()) % (largest // 2)
