"""Weights stored as 8-bit numbers with scales, restored while they are read.

A value is the number times the scale of its block: `w[i, j] = q[i, j] * s[i // m, j // n]` for
blocks of m rows and n columns. That is how DeepSeek-V3 (`weight_scale_inv`, blocks of 128 x 128)
and compressed-tensors (`weight_scale`: one for a tensor, a row, a group of columns, or a block)
write them. Both names stand for factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped

from adamerge_jax.checkpoints.composed import PartOfTensor
from adamerge_jax.checkpoints.dtypes import DTYPES, FLOAT32, INT8
from adamerge_jax.checkpoints.safetensors_file import TensorInfo, open_weights, read_entries
from adamerge_jax.errors import InputError, shorten

_FLOAT8 = tuple(map(np.dtype, (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)))

_SCALES = ("_scale_inv", "_scale")
"""Endings of the names of scales, behind the name of their tensor."""

_UNREAD = {"_zero_point": "a zero point", "_g_idx": "an order of its groups of columns"}
"""Endings of the names of what changes the meaning of numbers and is not read, in words."""

_SCALE_DTYPES = (*DTYPES.values(), np.dtype(ml_dtypes.float8_e8m0fnu))

_OF_ACTIVATIONS = (
    *(".input_scale", ".output_scale", ".activation_scale", ".input_scale_ub"),
    *(".q_scale", ".k_scale", ".v_scale"),
)
"""Endings of scales of activations, which are not in a model of plain numbers."""

_USUAL_BLOCK = (128, 128)
"""Rows and columns of a block of `weight_scale_inv` where the config does not say them."""

Block = tuple[int, int]
"""Rows and columns that share a scale."""


@dataclass(frozen=True)
class ScaledTensor(TensorInfo):
    """A tensor of 8-bit numbers with scales.

    Attributes:
        numbers: The stored numbers, `[..., R, C]`.
        scale: The stored scales, `[..., ceil(R / m), ceil(C / n)]`, of any shape if there is one.
        scale_name: The name of the scales in the file.
        block: The rows and columns that share a scale, m and n.
    """

    numbers: TensorInfo
    scale: TensorInfo
    scale_name: str
    block: Block

    @property
    def merged_dtype(self) -> np.dtype:
        """The dtype of a merge: bfloat16 holds the numbers, and rounds their products."""
        return DTYPES["bfloat16"]

    @property
    def stored(self) -> Mapping[str, TensorInfo]:
        """The numbers and the scales."""
        return {"": self.numbers, self.scale_name: self.scale}

    def read(self, name: str, first: int, out: Shaped[np.ndarray, " N"]) -> None:
        """Reads the entries `first : first + N` of the flattened tensor; see `TensorInfo.read`.

        Raises:
            InputError: A file is gone or cut off, or a scale is NaN or infinite.
        """
        columns = self.shape[-1]
        top, bottom = first // columns, -(-(first + len(out)) // columns)
        numbers = np.empty((bottom - top) * columns, self.numbers.dtype)
        with open_weights(self.numbers.file) as stream:
            read_entries(stream, name, self.numbers, top * columns, numbers)
        values = _as_float32(numbers).reshape(-1, columns)
        scales = self._scales(top, bottom)
        # A column of blocks at once, of whole rows: few more than those that are asked for.
        width = self.block[1]
        for column in range(scales.shape[1]):
            values[:, column * width : (column + 1) * width] *= scales[:, column, None]
        out[...] = values.reshape(-1)[first - top * columns :][: len(out)]

    def part(self, first: int, shape: tuple[int, ...]) -> TensorInfo:
        """Returns a part of the tensor; see `TensorInfo.part`."""
        return PartOfTensor(shape, self.dtype, self.file, self.start, self, first)

    def _scales(self, top: int, bottom: int) -> Float[np.ndarray, "rows blocks"]:
        """Reads the scales of each row from `top` to `bottom`, one for each block of columns."""
        height, width = self.block
        rows, columns = self.shape[-2:]
        across = -(-columns // width)
        row = np.arange(top, bottom)
        # Matrices before these have as many rows of blocks each.
        places = row // rows * -(-rows // height) + row % rows // height
        if prod(self.scale.shape) == 1:
            places = np.zeros_like(places)
        stored = np.empty((places[-1] + 1 - places[0], across), self.scale.dtype)
        self.scale.read(self.scale_name, int(places[0]) * across, stored.reshape(-1))
        scales = stored.astype(np.float32)
        if not (finite := np.isfinite(scales)).all():
            raise InputError(
                f"{self.scale.file}: {self.scale_name} holds {scales[~finite][0]}, expected finite "
                "scales; the file is damaged, or was quantised wrongly: take another copy"
            )
        return scales[places - places[0]]


def with_scales(
    tensors: Mapping[str, TensorInfo], config_fields: Mapping[str, Any], where: str
) -> tuple[dict[str, TensorInfo], int]:
    """Returns the tensors of a checkpoint, numbers and their scales as one.

    Scales of activations are left out. All is as it was where no tensor has scales.

    Args:
        tensors: The tensors in its files by name.
        config_fields: The fields of its config.json.
        where: The checkpoint, for messages.

    Returns:
        The tensors by name, and the number of those with scales.

    Raises:
        InputError: Numbers have no scales, or scales of a wrong shape or dtype.
    """
    settings = _settings(config_fields)
    # Whole numbers of other methods are rounded in ways of their own.
    is_compressed = settings.get("quant_method") == "compressed-tensors"
    stored = (*_FLOAT8, INT8) if is_compressed else _FLOAT8
    scales: dict[str, str] = {}
    for name, info in tensors.items():
        if info.dtype not in stored or name.endswith((*_SCALES, *_UNREAD)):
            continue
        scale = next((name + ending for ending in _SCALES if name + ending in tensors), None)
        if scale is None:
            raise InputError(
                f"{where}: {name} is stored as {info.dtype.name} without a scale ({name}_scale_inv "
                f"or {name}_scale); save the model in bfloat16, or copy it again"
            )
        for ending, in_words in _UNREAD.items():
            if name + ending in tensors:
                raise InputError(
                    f"{where}: {name} is stored with {in_words}, which is not read; save the model "
                    "in bfloat16"
                )
        scales[name] = scale
    if not scales:
        return dict(tensors), 0
    dropped = {*scales.values()} | {name for name in tensors if name.endswith(_OF_ACTIVATIONS)}
    plain = {}
    for name, info in tensors.items():
        if name in scales:
            plain[name] = _scaled(name, info, scales[name], tensors[scales[name]], settings, where)
        elif name not in dropped:
            plain[name] = info
    return plain, len(scales)


def _settings(config_fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the settings of quantisation, of the model or of a part such as its text model."""
    parts = (value for value in config_fields.values() if isinstance(value, dict))
    for fields in (config_fields, *parts):
        if isinstance(settings := fields.get("quantization_config"), dict):
            return settings
    return {}


def _scaled(
    name: str,
    info: TensorInfo,
    scale_name: str,
    scale: TensorInfo,
    settings: Mapping[str, Any],
    where: str,
) -> ScaledTensor:
    """Returns a tensor with its scales, whose dtype and shape are checked."""
    if scale.dtype not in _SCALE_DTYPES:
        raise InputError(
            f"{where}: {scale_name} is stored as {scale.dtype.name}, expected scales of floating "
            "point; save the model in bfloat16"
        )
    declared = _declared_block(settings, is_inverse=scale_name.endswith("_scale_inv"), where=where)
    block = _block(info.shape, scale.shape, declared)
    if block is None:
        expected = (
            f"one for each block of {declared[0]} x {declared[1]}"
            if declared
            else "one, or one for each row, group of columns, or block"
        )
        raise InputError(
            f"{where}: {scale_name} has shape {scale.shape} for {name} of shape {info.shape}; "
            f"expected {expected}: the file is damaged, or its config.json is another model's"
        )
    return ScaledTensor(info.shape, FLOAT32, info.file, info.start, info, scale, scale_name, block)


def _block(shape: tuple[int, ...], scales: tuple[int, ...], declared: Block | None) -> Block | None:
    """Returns the rows and columns that share a scale; None if the shapes do not fit."""
    if len(shape) < 2 or 0 in shape or 0 in scales:
        return None
    *leading, rows, columns = shape
    if prod(scales) == 1 and declared is None:
        return rows, columns
    scales = (*scales, *(1 for _ in shape[len(scales) :]))
    if len(scales) != len(shape) or [*scales[:-2]] != leading:
        return None
    down, across = scales[-2:]
    if declared is None:
        # A matrix as a whole, or each row in as many groups of columns as there are scales.
        is_whole, is_by_row = (down, across) == (1, 1), down == rows and columns % across == 0
        declared = (rows // down, columns // across) if is_whole or is_by_row else None
    if declared is None or (down, across) != (-(-rows // declared[0]), -(-columns // declared[1])):
        return None
    return declared


def _declared_block(settings: Mapping[str, Any], *, is_inverse: bool, where: str) -> Block | None:
    """Returns the block that a config names; None where shapes alone tell it."""
    if is_inverse:
        block = settings.get("weight_block_size", list(_USUAL_BLOCK))
    else:
        groups = settings.get("config_groups")
        weights = [
            group.get("weights")
            for group in (groups.values() if isinstance(groups, dict) else ())
            if isinstance(group, dict)
        ]
        blocks = [w.get("block_structure") for w in weights if isinstance(w, dict)]
        block = blocks[0] if blocks and all(other == blocks[0] for other in blocks) else None
    if block is None:
        return None
    is_block = isinstance(block, list) and len(block) == 2
    if not is_block or not all(type(size) is int and 1 <= size < 2**31 for size in block):
        raise InputError(
            f"{where}: the block of its quantization_config is {shorten(repr(block))}, expected "
            "two whole numbers above 0"
        )
    return block[0], block[1]


def restored_in_words(count: int) -> str:
    """Returns a note on the tensors of a checkpoint that have scales."""
    return f"{count} tensors of 8-bit numbers with scales are restored while they are read"


def _as_float32(numbers: Shaped[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Returns 8-bit numbers as float32."""
    if numbers.dtype == INT8:
        return numbers.astype(np.float32)
    # A table of all of them is many times as fast as to convert each.
    table = np.arange(256, dtype=np.uint8).view(numbers.dtype).astype(np.float32)
    return table[numbers.view(np.uint8)]
