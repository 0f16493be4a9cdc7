"""Quantised checkpoints: integers with scales of their own have no task vector."""

from collections.abc import Iterable, Mapping
from typing import Any

from adamerge_jax.errors import InputError

_SIGNS = {
    ".SCB": "bitsandbytes, 8 bit",
    ".weight_format": "bitsandbytes, 8 bit",
    ".absmax": "bitsandbytes, 4 bit",
    ".quant_map": "bitsandbytes, 4 bit",
    ".g_idx": "GPTQ",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "8-bit floating point",
    ".weight_scale_inv": "8-bit floating point",
    ".W_q": "HQQ",
}
"""Endings of tensors that only quantised checkpoints have, and the kind of quantisation."""

_METHODS = {"gptq": "GPTQ", "awq": "AWQ"}
"""Names of methods in a config.json whose tensors are called alike."""


def require_unquantized(
    tensors: Iterable[str], config_fields: Mapping[str, Any], where: str
) -> None:
    """Refuses a checkpoint whose tensors are those of a quantised model.

    A config that was left over from a quantised model is none: weights may have been restored.

    Args:
        tensors: The names of the tensors.
        config_fields: The fields of its config.json.
        where: The checkpoint, for messages: its role and source.

    Raises:
        InputError: With the kind of quantisation and the first tensor that shows it.
    """
    for name in tensors:
        # bitsandbytes names the state of a matrix after the matrix: q_proj.weight.absmax.
        kind = next((kind for ending, kind in _SIGNS.items() if name.endswith(ending)), None)
        if ".quant_state." in name:
            kind = "bitsandbytes, 4 bit"
        if kind:
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
        kind = _METHODS.get(method, kind or method[:40])
    return InputError(
        f"{where} is quantised ({kind or 'integers'}; it has {tensor}), and rounded weights have "
        "no task vector; name the model that it was quantised from, or restore one of "
        "bitsandbytes with model.dequantize() of transformers and save_pretrained"
    )
