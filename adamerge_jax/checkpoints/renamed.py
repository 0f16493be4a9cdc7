"""Names of tensors in files of several versions of `transformers`, as those versions map them.

Versions from 4.52 on have other modules than the first files of some architectures, and save the
first names or, when told to, those of their modules. Files of both kinds belong together. To import
`transformers.conversion_mapping` takes PyTorch, so its rules are repeated here, for the types of
models that people merge.
"""

import re
from collections import Counter
from collections.abc import Iterable

Rules = tuple[tuple[str, str], ...]
"""Patterns in the names of tensors and what stands for them, in the order of replacement."""

# Checkpoints converted from TensorFlow, bert-base-uncased among them, name LayerNorm's parameters
# as TensorFlow does. (LayerScale has a gamma too, which stays a gamma.)
_LEGACY: Rules = (
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
)
_OF_ALL: Rules = (
    *_LEGACY,
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
)
_IMAGE_TEXT: Rules = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.", "model.language_model."),
    (r"^(vision_tower|vision_model|multi_modal_projector|image_newline)\b", r"model.\1"),
    (r"^model\.language_model\.model\.", "model.language_model."),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)
_QWEN_VL: Rules = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
)
_TEXT_PART: Rules = ((r"^model\.language_model\.", "model."),)
_VIT: Rules = (
    (r"\bencoder\.layer\.", "layers."),
    (r"attention\.query\b", "q_proj"),
    (r"attention\.key\b", "k_proj"),
    (r"attention\.value\b", "v_proj"),
    (r"attention\.output\.dense\b", "attention.o_proj"),
    (r"intermediate\.dense\b", "mlp.fc1"),
    (r"output\.dense\b", "mlp.fc2"),
)
_DINOV2: Rules = (
    (r"attention\.attention\.(query|key|value)\b", r"attention.\1"),
    (r"attention\.query\b", "attention.q_proj"),
    (r"attention\.key\b", "attention.k_proj"),
    (r"attention\.value\b", "attention.v_proj"),
    (r"attention\.output\.dense\b", "attention.o_proj"),
)

_RULES: dict[str, Rules] = {
    **dict.fromkeys(
        (
            *("aria", "aya_vision", "gemma3", "got_ocr2", "internvl", "llava", "llava_next"),
            *("llava_next_video", "llava_onevision", "mistral3", "mllama", "paligemma", "vipllava"),
        ),
        _IMAGE_TEXT,
    ),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN_VL),
    **dict.fromkeys(("gemma3n_text", "qwen3_5_text", "qwen3_5_moe_text"), _TEXT_PART),
    **dict.fromkeys(
        (
            *("audio-spectrogram-transformer", "deit", "ijepa", "vit", "vit_mae", "vit_msn"),
            "vivit",
        ),
        _VIT,
    ),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), _DINOV2),
}
"""Rules that make one name of the names of a parameter, by `model_type`."""


def current_name(name: str) -> str:
    """Returns the name that a parameter with a legacy name has today."""
    return _replaced(name, _LEGACY)


def common_name(name: str, model_type: str) -> str:
    """Returns the one name that a parameter's names in all versions of `transformers` lead to.

    Args:
        name: A name in a file.
        model_type: The type of model in its config.
    """
    return _replaced(name, (*_OF_ALL, *_RULES.get(model_type, ())))


def renamed(expected: Iterable[str], in_file: Iterable[str], model_type: str) -> dict[str, str]:
    """Returns the tensors that are called otherwise by another version of `transformers`.

    Args:
        expected: The names of parameters that a file lacks.
        in_file: The names of its tensors that are no parameter.
        model_type: The type of model in its config.

    Returns:
        The name in the file by the name of the parameter; two that lead to one are left out.
    """
    common = {name: common_name(name, model_type) for name in in_file}
    counts = Counter(common.values())
    by_common = {short: name for name, short in common.items() if counts[short] == 1}
    pairs = {name: by_common.get(common_name(name, model_type)) for name in expected}
    return {name: tensor for name, tensor in pairs.items() if tensor is not None}


def _replaced(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
