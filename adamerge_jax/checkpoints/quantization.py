"""Quantised checkpoints whose form is not restored while they are read: they are refused."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from adamerge_jax.checkpoints.safetensors_file import TensorInfo
from adamerge_jax.errors import InputError, shorten

_SIGNS = {
    ".SCB": "bitsandbytes, 8 bit",
    ".weight_format": "bitsandbytes, 8 bit",
    ".absmax": "bitsandbytes, 4 bit",
    ".quant_map": "bitsandbytes, 4 bit",
    ".g_idx": "GPTQ",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".codebooks": "AQLM",
    "._data": "quanto",
    ".weight_scales": "EETQ",
    ".weight_scale": "8-bit floating point",
    ".weight_scale_inv": "8-bit floating point",
    ".W_q": "HQQ",
}
"""Endings of tensors that only quantised checkpoints have, and the kind of quantisation."""

_METHODS = {"gptq": "GPTQ", "awq": "AWQ", "mxfp4": "MXFP4"}
"""Names of methods in a config.json, where tensors do not tell them or are called otherwise."""

_PACKED = tuple(map(np.dtype, ("int8", "uint8", "int16", "uint16", "int32", "uint32")))
"""Dtypes of matrices that a plain model has not: its whole numbers are 64-bit positions."""


def require_unquantized(
    tensors: Mapping[str, TensorInfo], config_fields: Mapping[str, Any], where: str
) -> None:
    """Refuses a checkpoint whose tensors are those of a quantised model.

    A config that was left over from a quantised model is none: weights may have been restored.

    Args:
        tensors: The tensors by name.
        config_fields: The fields of its config.json.
        where: The checkpoint, for messages: its role and source.

    Raises:
        InputError: With the kind of quantisation and the first tensor that shows it.
    """
    is_declared = isinstance(config_fields.get("quantization_config"), dict)
    for name, info in tensors.items():
        # bitsandbytes names the state of a matrix after the matrix: q_proj.weight.absmax.
        kind = next((kind for ending, kind in _SIGNS.items() if name.endswith(ending)), None)
        if ".quant_state." in name:
            kind = "bitsandbytes, 4 bit"
        is_packed = is_declared and info.dtype in _PACKED and len(info.shape) > 1
        if kind or is_packed:
            raise quantized(where, name, kind, config_fields)


def quantized(
    where: str, tensor: str, kind: str | None, config_fields: Mapping[str, Any]
) -> InputError:
    """Returns the error about a quantised checkpoint.

    Args:
        where: The checkpoint: its role and source.
        tensor: The name of a tensor that shows it.
        kind: The kind of quantisation, None if only the config may tell it.
        config_fields: The fields of its config.json.
    """
    settings = config_fields.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if isinstance(method, str):
        kind = _METHODS.get(method, kind or shorten(method, 40))
    return InputError(
        f"{where} is quantised ({kind or 'integers'}; it has {tensor}), and rounded weights have "
        "no task vector; name the model that it was quantised from, or restore one of "
        "bitsandbytes with model.dequantize() of transformers and save_pretrained"
    )
