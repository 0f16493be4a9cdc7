"""Tiny random models of every `model_type` of the installed `transformers`.

    model = tiny_model("qwen3_moe", model_class("qwen3_moe"))

A config is made small by its fields, whose names most architectures share: two layers, 32 hidden
units, a vocabulary of 128. Where an architecture refuses that, layers and tables are made small and
all widths are divided by one number, which keeps their ratios; then fewer fields are changed, until
one can be built. A model that stays large is not made.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from config_fields import parts_of

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
            *("l_layers", "x_layers", "r_layers"),
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
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_d_ssm", "mamba_intermediate_size"), 64),
    **dict.fromkeys(("ssm_state_size", "mamba_d_state", "state_size"), 16),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups"), 1),
}

_TABLES = {
    **dict.fromkeys(
        (
            *("vocab_size", "vocab_size_per_layer_input", "n_vocab", "text_vocab_size"),
            *("encoder_hash_byte_group_vocab", "unpadded_vocab_size"),
        ),
        _VOCABULARY,
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
    r"|out_features|out_indices|stage_names|layer_rope_theta|per_layer_config"
)
"""Fields with an entry for each layer, which a config makes anew for fewer layers."""

_DEPTHS = (
    *("depths", "blocks_per_stage", "stage_num_blocks", "layers_per_stage", "num_block_repeats"),
)

_COEFFICIENTS = {"depth_coefficient": 0.3, "width_coefficient": 0.25}
"""Factors of depths and widths."""

_ABSENT = {
    **{"vocab_size": _VOCABULARY, "prediction_length": 4, "n_routed_experts": 8},
    **{"num_experts_per_tok": 2, "rope_theta": 1e4, "default_language": "en_XX"},
}
"""Values of fields whose default is None, which their architectures refuse."""

_SECTIONS = "rope_parameters.mrope_section"

_LLAMA4_VISION = {
    **{"intermediate_size": 128, "projector_input_dim": 32, "projector_output_dim": 32},
    **{"vision_output_dim": 32, "image_size": 56, "patch_size": 14},
}


def _of_part(part: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{part}.{name}": value for name, value in fields.items()}


_SMALL_IMAGES = _of_part("vision_config", {"image_size": 56, "patch_size": 14})

_SMALL_SAM = _of_part("sam_config", {"downsample_channels": [32, 32], "image_size": 64})

_SMALL_SAM3 = {
    "detr_decoder_config.num_queries": 8,
    "vision_config.fpn_hidden_size": 32,
    "vision_config.backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    **_of_part("vision_config.backbone_config", {"image_size": 112, "pretrain_image_size": 112}),
    "vision_config.backbone_config.window_size": 4,
}

_FOUR_STAGES = {
    **{"image_size": 56, "num_hidden_layers": 4},
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}

_SMALL_BACKBONE = _of_part("backbone_config", _FOUR_STAGES)

_SMALL_SWIN = _of_part("backbone_config", {"image_size": 64, "num_heads": [2, 4, 8, 16]})

_SMALL_RESNET = _of_part(
    "backbone_config",
    {
        **{"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
        "layer_type": "basic",
    },
)

_ROTATIONS_BY_LAYER = {
    layer_type: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    for layer_type in ("full_attention", "sliding_attention")
}

_OF_TYPES: dict[str, dict[str, Any]] = {
    "align": dict.fromkeys(("initializer_range", "vision_config.initializer_range"), 0.2),
    "aria": {**_SMALL_IMAGES, "projector_patch_to_query_dict": {16: 4}},
    "aya_vision": _SMALL_IMAGES,
    "bridgetower_vision_model": {"image_size": 64},
    "blip-2": {"image_token_index": 99},
    "chameleon": {"vocabulary_map": {"<image>": 99}},
    "chmv2": _SMALL_BACKBONE | {"backbone_config.image_size": 64},
    "cohere_compass": {"text_config.rope_parameters": _ROTATIONS_BY_LAYER},
    "cohere_compass_text": {"rope_parameters": _ROTATIONS_BY_LAYER},
    "cosmos3_edge": {f"text_config.{_SECTIONS}": [2, 1, 1]},
    "cosmos3_edge_text": {_SECTIONS: [2, 1, 1]},
    "csm": {"codec_config.upsample_groups": 32},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_ocr2_vision": _SMALL_SAM,
    "deepseek_v2": {"num_key_value_heads": 4},
    "depth_anything": _SMALL_BACKBONE,
    "depth_pro": {
        **{"patch_size": 32, "fusion_hidden_size": 32, "intermediate_hook_ids": [1, 0]},
        **{"intermediate_feature_dims": [32, 32], "scaled_images_feature_dims": [32, 32, 32]},
        **{
            f"{part}_model_config.{name}": value
            for part in ("image", "patch", "fov")
            for name, value in {"image_size": 32, "patch_size": 8}.items()
        },
    },
    "dory": {
        **dict.fromkeys(("n_input_layers", "n_recurrent_layers", "n_output_layers"), 1),
        "num_hidden_layers": 3,
    },
    "dots1": {"n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 99, "<image>": 98}},
    "ernie4_5_vl_moe": {f"text_config.{_SECTIONS}": [1, 1, 2]},
    "ernie4_5_vl_moe_text": {_SECTIONS: [1, 1, 2]},
    "gemma3": {"vision_config.image_size": 256},
    "granite4_vision": {
        **_of_part("vision_config", {"image_size": 64, "patch_size": 8, "hidden_size": 64}),
        **{"downsample_rate": "4/8", "deepstack_layer_map": [[-1, 0]]},
        **{"spatial_target_layers": [1], "qformer_config.hidden_size": 64},
    },
    "grounding-dino": _SMALL_SWIN,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl": {"text_config.head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8},
    "hy_v4_vl": {f"text_config.{_SECTIONS}": [2, 1, 1]},
    "hy_v4_vl_text": {_SECTIONS: [2, 1, 1]},
    "idefics3": {"vision_config.image_size": 64, "vision_config.patch_size": 8},
    "instructblip": {"image_token_index": 99},
    "instructblipvideo": {"video_token_index": 99},
    "janus_vqgan": {"num_patches": 4},
    "kimi_k25": {
        **{"vision_config.hidden_size": 64, "projection_hidden_size": 64},
        "text_config.num_key_value_heads": 4,
    },
    "kosmos-2": {"latent_query_num": 4, "vision_config.image_size": 56},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lighton_ocr": _SMALL_IMAGES,
    "llama4": _of_part("vision_config", _LLAMA4_VISION),
    "llama4_vision_model": _LLAMA4_VISION,
    "mamba2": {"num_heads": 8},
    "mimi": {"upsample_groups": 32},
    "ministral": {"head_dim": 8},
    "mistral3": _SMALL_IMAGES,
    "mistral_large4": _SMALL_IMAGES,
    "mm-grounding-dino": _SMALL_SWIN,
    "mllama_vision_model": {"image_size": 56, "intermediate_layers_indices": [0]},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "nemotron": {"num_key_value_heads": 2},
    "omdet-turbo": {
        **{"encoder_in_channels": [8, 16, 16], "image_size": 64},
        "apply_layernorm_after_vision_backbone": False,
    },
    "paddleocr_vl": {f"text_config.{_SECTIONS}": [2, 1, 1]},
    "pixtral": {"image_size": 56, "patch_size": 14},
    "prompt_depth_anything": _SMALL_BACKBONE,
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 64},
    "reformer": {
        **{"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_shape": [8, 8]},
        **{"axial_pos_embds_dim": [16, 16], "feed_forward_size": 64},
    },
    "rf_detr": {"backbone_config.image_size": 112, "backbone_config.num_windows": 2},
    "sam3": _SMALL_SAM3,
    "sam3_lite_text": _SMALL_SAM3,
    "seggpt": {"image_size": [64, 32], "pretrain_image_size": 32, "patch_size": 8},
    "shieldgemma2": {"vision_config.image_size": 256},
    "smolvlm": {"vision_config.image_size": 64, "vision_config.patch_size": 8},
    "step3p5": {"sliding_window": 4},
    "step3p7": {"text_config.sliding_window": 4},
    "molmo2_vision": {"image_size": [56, 56], "num_position_embeddings": 16},
    **{name: {"dropout_rate": 0.0} for name in ("t5gemma2_decoder", "t5gemma2_text")},
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0},
    "textnet": {"image_size": [64, 64]},
    "tipsv2_dpt": _SMALL_BACKBONE,
    "tvp": {**_SMALL_RESNET, "max_img_size": 64, "visual_prompt_size": 8, "num_frames": 2},
    "videoprism": _of_part("vision_config", {"image_size": 36, "num_frames": 2}),
    "unlimited_ocr_vision": _SMALL_SAM,
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "vjepa2": {"crop_size": 32, "frames_per_clip": 4},
    "zoedepth": _SMALL_BACKBONE | {"backbone_config.image_size": 64},
}
"""Values by dotted name and type, of sizes that depend on one another."""

_IN_ALL_SETTINGS = ("image_size", "num_patches", "initializer_range")
"""Fields of `_OF_TYPES` that hold for widths of any size; others are for the smallest widths."""

_DIVISOR = "*"
"""The entry of settings whose value divides all widths that have no setting of their own."""

_STAGES = "stages"
"""The entry of settings that keep the outputs of backbones in stages, which are no layers."""

_LISTS_BY_STAGE = ("out_features", "out_indices", "stage_names")

_SHRINKAGES: tuple[Mapping[str, Any], ...] = (
    _LAYERS | _WIDTHS | _TABLES,
    _LAYERS | _WIDTHS | _TABLES | {_STAGES: True},
    _LAYERS | _TABLES | {_DIVISOR: 16, _STAGES: True},
    _LAYERS | _WIDTHS | _TABLES | {_DIVISOR: 8},
    _LAYERS | _TABLES | {_DIVISOR: 16},
    _LAYERS | _TABLES | {_DIVISOR: 8},
    _LAYERS | _TABLES | {_DIVISOR: 4},
    _LAYERS | _TABLES,
    _LAYERS,
    _TABLES | {_DIVISOR: 8},
    _TABLES,
    {},
)
"""Settings by field, the smallest models first."""

_SMALLEST_WIDTH = 64
"""The smallest number that may be divided: heads, groups and sides of patches are smaller."""

_NO_WIDTH = re.compile(
    r".*(image|patch|window|kernel|stride|rate|token|_id|index|size_per|resolution|crop|position"
    r"|length|max_|min_|num_labels|scale|factor|eps|theta|freq|fft|hop|mel|sampl|bucket|distance"
    r"|offset|version|queries|points|ratio|steps|bins).*"
)
"""Names of numbers that are no widths."""


class NotMadeError(Exception):
    """A model type of which no tiny model can be made, with the reason."""


def model_types() -> list[str]:
    """Returns the model types whose config `transformers` finds by its name, sorted."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


def model_class(model_type: str, tables: Sequence[str] = ()) -> type[PreTrainedModel]:
    """Returns the class for models of a type: a language model's where there is one.

    Args:
        model_type: The `model_type` of their config.
        tables: Tables of `transformers` from types to classes that come first.

    Raises:
        NotMadeError: No class has a config of this type.
    """
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    others = [
        name
        for name in dir(modeling_auto)
        if name.endswith("MAPPING_NAMES") and name != "CONFIG_MAPPING_NAMES"
    ]
    usual = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_MAPPING_NAMES")
    for table in (*tables, *usual, *others):
        if name := getattr(modeling_auto, table).get(model_type):
            try:
                return getattr(transformers, name if isinstance(name, str) else name[0])
            except AttributeError as error:
                raise NotMadeError(in_short(error)) from error
    config_class = CONFIG_MAPPING[model_type]
    modules = config_class.__module__.replace(".configuration_", ".modeling_")
    try:
        module = importlib.import_module(modules)
    except ImportError as error:
        raise NotMadeError(f"no class of models: {in_short(error)}") from error
    for candidate in vars(module).values():
        if (
            isinstance(candidate, type)
            and issubclass(candidate, transformers.PreTrainedModel)
            and candidate.config_class is config_class
            and not candidate.__name__.endswith("PreTrainedModel")
        ):
            return candidate
    raise NotMadeError("a part of other models: no class has a config of this type")


def in_short(error: Exception) -> str:
    """Returns an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def tiny_model(
    model_type: str,
    model_class: type[PreTrainedModel],
    *,
    seed: int = 0,
    accepts: Callable[[PreTrainedModel], object] = lambda model: None,
) -> PreTrainedModel:
    """Makes a tiny random model in float32, in evaluation mode, with eager attention.

    Args:
        model_type: The `model_type` of its config.
        model_class: The class of the model.
        seed: The seed of its weights.
        accepts: A function that raises for a model that is not good enough. Where it does for all,
            the smallest model is returned.

    Raises:
        NotMadeError: With the reason.
    """
    import torch

    reason, second_best = "", None
    for settings in _SHRINKAGES:
        try:
            with torch.device("meta"):
                empty = model_class(tiny_config(model_type, settings))
        except Exception as error:  # whatever an architecture says of sizes that do not fit
            reason = reason or in_short(error)
            continue
        size = sum(parameter.numel() for parameter in empty.parameters())
        if size > MOST_PARAMETERS:
            reason = reason or f"{size / 1e6:.0f} M parameters"
            continue
        torch.manual_seed(seed)
        try:
            model = _filled(model_class, tiny_config(model_type, settings)).eval()
        except Exception as error:
            reason = reason or in_short(error)
            continue
        try:
            accepts(model)
        except Exception:
            second_best = model if second_best is None else second_best
            continue
        return model
    if second_best is None:
        raise NotMadeError(reason)
    return second_best


def _filled(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """Makes a model with values where its class leaves none, and finite bounds of activations."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # what is not filled is NaN
    try:
        model = model_class(config)
    finally:
        torch.use_deterministic_algorithms(before)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            drawn = 0.02 * torch.randn_like(tensor)
            finite = torch.nan_to_num(tensor, nan=0.0, posinf=8.0, neginf=-8.0)
            tensor.copy_(torch.where(tensor.isnan(), drawn, finite))
    return model


def tiny_config(model_type: str, settings: Mapping[str, Any] = _SHRINKAGES[0]) -> PretrainedConfig:
    """Returns the default config of a type with small values, in its parts (text, vision) too.

    Args:
        model_type: The `model_type`.
        settings: Values by the names of fields; others stay at their defaults.
    """
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    fields = _shrunk(config_class().to_dict(), settings)
    for name, value in _OF_TYPES.get(model_type, {}).items() if settings else ():
        *parts, field = name.split(".")
        if "hidden_size" in settings or field in _IN_ALL_SETTINGS:
            holder = fields
            for part in parts:
                holder = holder[part]
            holder[field] = copy.deepcopy(value)
    config = config_class.from_dict(fields, attn_implementation="eager")
    for part in parts_of(config):
        if getattr(part, "use_cache", None):
            part.use_cache = False
        _fit_positions(part)
    return config


def _fit_positions(config: PretrainedConfig) -> None:
    """Divides a head's frequencies among time, height and width where their numbers are fixed."""
    rope = getattr(config, "rope_parameters", None)
    if not rope or "mrope_section" not in getattr(config, "ignore_keys_at_rope_validation", ()):
        return
    if any(isinstance(value, Mapping) for value in rope.values()):  # of each kind of layers
        return
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
    third, rest = half // 3, half - 2 * (half // 3)
    # Two of the three are equal.
    is_last = len(set(rope.get("mrope_section", (2, 1))[:2])) == 1
    rope["mrope_section"] = [third, third, rest] if is_last else [rest, third, third]


def _shrunk(fields: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config, or of one of its parts, with small values."""
    shrinks_layers = "num_hidden_layers" in settings
    small = dict(_shrunk_fields(fields, settings))
    if shrinks_layers:
        keeps_stages = _STAGES in settings and "num_hidden_layers" not in fields
        small = {
            name: value
            for name, value in small.items()
            if not _is_by_layer(name, value) or (keeps_stages and name in _LISTS_BY_STAGE)
        }
        layers = fields.get("num_hidden_layers")
        for name, value in small.items():  # an entry for each layer of any other name
            if isinstance(value, list) and len(value) == layers:
                small[name] = value[: settings["num_hidden_layers"]]
    return small


def _is_by_layer(name: str, value: Any) -> bool:
    return isinstance(value, list | dict) and _LISTS_BY_LAYER.fullmatch(str(name)) is not None


def _shrunk_fields(
    fields: Mapping[str, Any], settings: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    largest_id = _VOCABULARY - 1 if "vocab_size" in settings else None
    for name, value in fields.items():
        if not isinstance(name, str):  # ids of labels
            yield name, value
        elif name == "pad_token_id" and value is None:
            yield name, 0  # without one, classifiers read one text at a time
        elif name in _ABSENT and value is None:
            yield name, _ABSENT[name]
        elif "num_hidden_layers" in settings and name in _COEFFICIENTS:
            yield name, _COEFFICIENTS[name]
        elif isinstance(value, Mapping):
            is_elsewhere = value.get("model_type") == "timm_backbone"
            yield name, _backbone(value) if is_elsewhere else _shrunk(value, settings)
        elif name in settings and _is_size(value):
            new = settings[name]
            if isinstance(value, int):
                yield name, min(value, new)
            else:  # an entry for each of several stages
                yield name, new if isinstance(new, list) else value
        elif _DIVISOR in settings and _is_width(name, value):
            yield name, _divided(value, settings[_DIVISOR])
        elif "num_hidden_layers" in settings and name in _DEPTHS and isinstance(value, list):
            yield name, [1] * len(value)
        elif largest_id is not None and re.fullmatch(r".*token_(id|index)", name):
            is_outside = isinstance(value, int) and value > largest_id
            yield name, _token_id(name, largest_id) if is_outside else value
        else:
            yield name, value


def _backbone(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of a ResNet with as many outputs as a backbone of another package."""
    count = len(fields.get("out_indices") or [0])
    stages = ["stem", "stage1", "stage2", "stage3", "stage4"]
    return {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": stages[-count:],
    }


def _is_size(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, int) and not isinstance(value, bool))


def _is_width(name: str, value: Any) -> bool:
    """Returns True for a number, or a list of them, that is divided to make a model small."""
    numbers = value if isinstance(value, list) and value else [value]
    return _NO_WIDTH.fullmatch(name) is None and all(
        type(number) is int and number >= _SMALLEST_WIDTH for number in numbers
    )


def _divided(value: int | list[int], divisor: int) -> int | list[int]:
    if isinstance(value, list):
        return [max(number // divisor, 1) for number in value]
    return value // divisor if value % divisor == 0 else value


def _token_id(name: str, largest: int) -> int:
    """Returns an id within the vocabulary that few other tokens have, the same on every call."""
    return largest - sum(name.encode()) % (largest // 2)
