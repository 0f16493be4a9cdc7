"""The config.json of a checkpoint: its fields as they stand in the file, and the model's config."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adamerge_jax.checkpoints.config_limits import (
    require_consistent,
    require_plain,
    require_possible,
)
from adamerge_jax.checkpoints.safetensors_file import TensorInfo
from adamerge_jax.errors import InputError, in_one_line
from adamerge_jax.files.json_object import read_object
from adamerge_jax.models import ARCHITECTURES

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"

Fields = dict[str, Any]
"""The fields of a JSON file, in its order and under its names."""


def read_config_file(folder: Path) -> Fields:
    """Returns the fields of the config.json in a checkpoint's folder.

    Raises:
        InputError: It is missing, cannot be read, or holds no fields.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise InputError(
            f"{folder} has no {CONFIG_FILE}; give the folder that `save_pretrained` wrote"
        )
    return read_object(file)


def classes_of(fields: Fields) -> list[str]:
    """Returns the names of the model's classes, such as `BertForMaskedLM`; none where none are."""
    classes = fields.get("architectures")
    return [name for name in classes if isinstance(name, str)] if isinstance(classes, list) else []


def config_of(folder: Path, fields: Fields, tensors: Mapping[str, TensorInfo]) -> PretrainedConfig:
    """Returns the config of a checkpoint, whose fields are checked before anything is made by them.

    Args:
        folder: The folder of the checkpoint.
        fields: The fields of its config.json.
        tensors: Its tensors, which bound the sizes that a config may claim.

    Raises:
        InputError: The fields describe no model that can exist, or none that `transformers` knows.
    """
    file = folder / CONFIG_FILE
    # Without the one `transformers` guesses by the folder's name; with the other it reads a file
    # that is not checked here.
    if not isinstance(fields.get("model_type"), str) or "configuration_files" in fields:
        raise InputError(
            f"{file} must name its model_type, and no configuration_files; save the config again "
            "with config.save_pretrained(folder)"
        )
    # Of others the fields may mean something else: heads a stage, no types of tokens.
    has_family = fields["model_type"] in ARCHITECTURES
    require_possible(fields, str(file), tensors, usual=has_family)
    from transformers import AutoConfig, PretrainedConfig

    require_plain(fields, str(file), PretrainedConfig)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # A config's own validation raises errors of many types.
    except Exception as error:
        raise InputError(
            f"{file} is not a configuration that transformers knows: {in_one_line(error)}"
        ) from error
    if has_family:
        require_consistent(config, str(file))
    if any(name.startswith("AutoModel") for name in fields.get("auto_map") or ()):
        log.warning(
            "%s names code of its own (auto_map), which is never run: it is read as a %r of "
            "transformers",
            file,
            config.model_type,
        )
    return config


def fields_of(config: PretrainedConfig) -> Fields:
    """Returns the fields of the config.json of a model that was made here."""
    return json.loads(config.to_json_string())
