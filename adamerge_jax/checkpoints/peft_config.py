"""The config of a PEFT adapter: the kinds of LoRA that are supported, and their scaling."""

import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from adamerge_jax.checkpoints.finite import is_number
from adamerge_jax.checkpoints.patterns import first_matches
from adamerge_jax.errors import InputError
from adamerge_jax.files.json_object import read_object
from adamerge_jax.models.problem import TOKEN_CLASSIFICATION

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

MERGE_IT = "merge it into its model with PEFT's merge_and_unload() and give that"

TASK_TYPES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": TOKEN_CLASSIFICATION,
}
"""The `transformers` classes of models with a head for their task, by PEFT's task types."""

_UNSUPPORTED = {
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "LoRA with biases of its own",
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

_SWITCHES = ("use_dora", "use_rslora", "fan_in_fan_out")
"""Fields that are true or false."""

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
        config = read_object(folder / CONFIG_FILE)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if (kind := config.get("peft_type")) != "LORA":
        raise InputError(
            f"{where} is an adapter of type {reprlib.repr(kind)}; only LORA is supported: "
            f"{MERGE_IT}"
        )
    for name, feature in _UNSUPPORTED.items():
        if config.get(name):
            raise InputError(
                f"{where} uses {feature}, which is not supported as factors; {MERGE_IT}"
            )
    for name in _SWITCHES:
        if not isinstance(config.get(name) or False, bool):
            raise InputError(
                f"{where} has {name} {reprlib.repr(config[name])} in its {CONFIG_FILE}, which is "
                "neither true nor false; copy the adapter again"
            )
    initialization = config.get("init_lora_weights")
    if isinstance(initialization, str) and initialization.lower().startswith(_BASE_CHANGING):
        raise InputError(
            f"{where} has init_lora_weights {reprlib.repr(initialization)}, which changes the "
            "base's own weights: its factors alone are no task vector; save it with "
            f"path_initial_model_for_weight_conversion, or {MERGE_IT}"
        )
    return config


def model_name(source: str) -> str:
    """Returns the part of a folder or Hub name that stays the same wherever a model lies.

    It is the last one, without regard to case; in the Hub's cache it is that of the repository.
    """
    parts = [part for part in source.replace("\\", "/").split("/") if part not in ("", ".")]
    if len(parts) > 2 and parts[-2] == "snapshots":
        parts = parts[:-2]
    return parts[-1].rpartition("--")[2].casefold() if parts else ""


def scalings(config: Mapping[str, Any], ranks: Mapping[str, int], where: str) -> dict[str, float]:
    """Returns the factor of each module's B A: `alpha / r`, or `alpha / sqrt(r)` for rsLoRA.

    Args:
        config: The adapter's config.
        ranks: The rank r of each module's factors, by the module's name.
        where: The adapter, for messages: its role and source.

    Raises:
        InputError: A number is none or not finite in float32, a rank is 0 or another one than the
            config's, or regular expressions are invalid or take too long.
    """
    alphas = _by_module(config, "alpha_pattern", "lora_alpha", _DEFAULT_ALPHA, ranks, where)
    expected_ranks = _by_module(config, "rank_pattern", "r", None, ranks, where)
    factors = {}
    for module, rank in ranks.items():
        alpha, expected = alphas[module], expected_ranks[module]
        if rank < 1 or rank != (rank if expected is None else expected):
            expected = "at least 1" if expected is None else f"{expected:g}"
            raise InputError(
                f"{where} has factors of rank {rank} for {module}, its {CONFIG_FILE} says "
                f"{expected}; both files must come from one training: copy the adapter again"
            )
        factors[module] = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return factors


def _by_module(
    config: Mapping[str, Any],
    patterns: str,
    general: str,
    default: float | None,
    modules: Collection[str],
    where: str,
) -> dict[str, Any]:
    """Returns the value of a setting for each module: of its first pattern, else the general one.

    Args:
        config: The adapter's config.
        patterns: The field that holds values by regular expression of modules' names.
        general: The field that holds the value of all other modules.
        default: The value of the latter if the config lacks it.
        modules: The names of the modules.
        where: The adapter, for messages.
    """
    by_pattern = config.get(patterns) or {}
    field = f"{where}: {patterns} of {CONFIG_FILE}"
    if not isinstance(by_pattern, dict):
        raise InputError(f"{field} is {reprlib.repr(by_pattern)}; expected numbers by module name")
    values = [_number(value, f"{field} for {key[:60]!r}") for key, value in by_pattern.items()]
    # The expression that PEFT makes of a key.
    expressions = [rf"(.*\.)?({key})$" for key in by_pattern]
    of_others = config.get(general, default)
    if of_others is not None or general in config:
        of_others = _number(of_others, f"{where}: {general} of {CONFIG_FILE}")
    matches = first_matches(expressions, list(modules), field)
    return {
        module: of_others if position is None else values[position]
        for module, position in zip(modules, matches, strict=True)
    }


def _number(value: Any, where: str) -> float:
    """Returns a number of the config, and refuses what is none or not finite in float32."""
    if not is_number(value):
        raise InputError(f"{where} is {reprlib.repr(value)}; expected a finite number")
    return float(value)
