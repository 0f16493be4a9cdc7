"""The config of a PEFT adapter: the kinds of LoRA that are supported, and their scaling."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adamerge_jax.errors import InputError, in_one_line

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

MERGE_IT = "merge it into its model with PEFT's merge_and_unload() and give that"

_UNSUPPORTED = {
    "use_dora": "DoRA, which rescales the merged weights",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "LoRA with biases of its own",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trainable token indices",
    "target_parameters": "LoRA on parameters rather than modules",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow, which routes between adapters",
    "kasa_config": "KaSA, which has singular values between its factors",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron layers",
}
"""Fields of a config that change the meaning of an adapter, and the features that they enable."""

_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` with which PEFT changes the base's own weights."""

_DEFAULT_ALPHA = 8  # PEFT's


def read_adapter_config(folder: Path, where: str) -> dict[str, Any]:
    """Reads the config of a LoRA adapter.

    Args:
        folder: The folder of the adapter.
        where: The adapter, for messages: its role and source.

    Raises:
        InputError: It is damaged, of another kind of adapter, or of a kind of LoRA that is not
            supported.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: {CONFIG_FILE} is not JSON: {in_one_line(error)}") from error
    if not isinstance(config, dict):
        raise InputError(f"{where}: {CONFIG_FILE} holds no fields; copy or download it again")
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{where} is an adapter of type {config.get('peft_type')!r}; only LORA is supported: "
            f"{MERGE_IT}"
        )
    for name, feature in _UNSUPPORTED.items():
        if config.get(name):
            raise InputError(
                f"{where} uses {feature}, which is not supported as factors; {MERGE_IT}"
            )
    initialization = config.get("init_lora_weights")
    if isinstance(initialization, str) and initialization.lower().startswith(_BASE_CHANGING):
        raise InputError(
            f"{where} has init_lora_weights {initialization!r}, which changes the base's own "
            "weights: its factors alone are no task vector; save it with "
            f"path_initial_model_for_weight_conversion, or {MERGE_IT}"
        )
    return config


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Returns the factor of a module's B A: `alpha / r`, or `alpha / sqrt(r)` for rsLoRA."""
    patterns = config.get("alpha_pattern") or {}
    matching = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    alpha = next(matching, config.get("lora_alpha", _DEFAULT_ALPHA))
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
