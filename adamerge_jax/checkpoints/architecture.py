"""The architecture that a config describes, compared between a base and its experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Config fields that decide a parameter's shape or what is computed with it. Many leave every
# shape as it is (the number of heads, the activation), so shapes alone cannot tell.
_ARCHITECTURE_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "max_position_embeddings", "type_vocab_size"),
    *("image_size", "patch_size", "num_channels", "pooler_output_size"),
    *("hidden_act", "activation", "activation_function", "pooler_act"),
    *("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps"),
    *("qkv_bias", "attention_bias", "mlp_bias"),
    *("position_embedding_type", "sinusoidal_pos_embds"),
    *("rope_parameters", "partial_rotary_factor", "sliding_window", "layer_types"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    *("hidden_activation", "tie_word_embeddings", "scale_decoder_outputs", "feed_forward_proj"),
    *("relative_attention_max_distance", "num_decoder_layers", "is_decoder", "add_cross_attention"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob"),
    *("use_parallel_residual", "norm_eps", "norm_bias"),
    *("relative_attention", "max_relative_positions", "position_buckets", "position_biased_input"),
    *("pos_att_type", "share_att_key", "norm_rel_ebd"),
)

# The value of a field that a config lacks, where all versions of `transformers` agree on it.
_DEFAULTS = {"position_embedding_type": "absolute"}

# Fields in which None is a value of its own: no window, no cap.
_OPTIONAL = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")

# A config with one of these has computed positions and no table of them: their number is advice
# then, and fine-tuning changes it.
_COMPUTED_POSITIONS = ("rope_parameters", "rope_theta", "relative_attention_num_buckets")


def require_same_architecture(base: Checkpoint, expert: Checkpoint, *, role: str) -> None:
    """Refuses an expert whose config describes another network than the base's.

    The number of tokens may differ: rows of tables are matched when tensors are.

    A part of a model may be compared with the whole: a vision tower with a CLIP.

    Args:
        base: The base model.
        expert: The checkpoint to compare with it.
        role: The role of that checkpoint in the merge, for the message: `expert 'trec'`.

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
        for name in _ARCHITECTURE_FIELDS:
            of_base = _field(base_parts[part], name)
            of_expert = _field(expert_parts[part], name)
            # A field that only one of them has came with another version of transformers.
            is_missing = of_base is None or of_expert is None
            if of_base == of_expert or (is_missing and not _is_optional(name, base_parts[part])):
                continue
            raise InputError(
                f"{where} has {name} {of_expert!r} in its config.json, the base ({base.source}) "
                f"has {of_base!r}; an expert must be fine-tuned from the base"
            )


def _field(config: PretrainedConfig, name: str) -> Any:
    """Returns a config's value of a field, None if it tells nothing of the architecture."""
    if name == "max_position_embeddings" and any(
        getattr(config, field, None) is not None for field in _COMPUTED_POSITIONS
    ):
        return None
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # a Gemma 4's layers have values of their own
        value = [getattr(layer, name) for layer in config.per_layer_config]
    return _without_legacy_type(_DEFAULTS.get(name) if value is None else value)


def _is_optional(name: str, config: PretrainedConfig) -> bool:
    """Returns True if None is a value of this field in a config of this kind."""
    return name in _OPTIONAL and hasattr(config, name)


def _without_legacy_type(value: Any) -> Any:
    """Removes the name that `rope_type` had in older configs from settings of rotary positions."""
    if not isinstance(value, dict):
        return value
    repeated = "type" in value and value.get("rope_type") == value["type"]
    return {
        key: _without_legacy_type(setting)
        for key, setting in value.items()
        if not (repeated and key == "type")
    }


def _parts(config: PretrainedConfig) -> dict[str, PretrainedConfig]:
    """Returns the config and those of its parts (text, vision, ...), by their model type."""
    parts = [getattr(config, name) for name in config.sub_configs]
    return {part.model_type: part for part in [config, *parts] if part is not None}
