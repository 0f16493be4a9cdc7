"""Tables of tokens with more or fewer rows than the base's: padded ones, and added tokens.

A row is a token, in the output layer as in the embeddings. Tokens that both models have are merged
and all others are the base's, as a merge has the base's tables.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

import numpy as np

from adamerge_jax.checkpoints.composed import JoinedTensor
from adamerge_jax.checkpoints.matching import TOKEN_EMBEDDINGS, MatchedCheckpoint
from adamerge_jax.checkpoints.safetensors_file import TensorInfo
from adamerge_jax.checkpoints.tokenizer_files import has_tokenizer, load_tokenizer
from adamerge_jax.errors import InputError, and_more
from adamerge_jax.parameter_names import matches

log = logging.getLogger(__name__)

_Tokens = Mapping[int, str]
"""The tokens of a model by id."""

_SHOWN = 3
"""The number of tokens that a message names."""


def fit_to_rows(base: MatchedCheckpoint) -> Callable[[MatchedCheckpoint], MatchedCheckpoint]:
    """Returns the function that gives tables of tokens as many rows as the base's have.

    It takes an expert that is a whole model; its tables may have any number of rows. Rows beyond
    those of the base are left out; where the expert has fewer, the last ones are the base's. No row
    is read. The checkpoint's notes say it, and a warning names tokens that the merge has no rows
    for. It raises an `InputError` if an id means another token in the two tokenizers, or the config
    says another number of tokens than there are rows.

    The base's tokenizer is read once, and only if an expert has other rows.

    Args:
        base: The base.
    """
    return partial(_with_rows_of, base, cache(partial(_tokens, base)))


def _with_rows_of(
    base: MatchedCheckpoint, read_base_tokens: Callable[[], _Tokens], expert: MatchedCheckpoint
) -> MatchedCheckpoint:
    """Returns an expert with as many rows in its tables as the base has: see `fit_to_rows`."""
    sizes = {
        (expert.shape(name)[0], base.shape(name)[0])
        for name in expert.names
        if name in base.names
        and matches(name, TOKEN_EMBEDDINGS)
        and _is_resized(name, base, expert)
    }
    _require_rows_of_config(base, expert)
    if len(sizes) != 1:
        return expert  # two sizes are no vocabulary, and their shapes are refused
    ((rows, base_rows),) = sizes
    where = f"{expert.role} ({expert.checkpoint.source})"
    tokens, base_tokens = _tokens(expert), read_base_tokens()
    _require_same_tokens(tokens, base_tokens, min(rows, base_rows), where)
    left_out = tuple(tokens[number] for number in sorted(tokens) if number >= base_rows)
    if left_out:
        log.warning(
            "%s has %d token(s) that the base has no rows for (%s): they are left out of the merge",
            where,
            len(left_out),
            _named(left_out),
        )
    note = f"its tables of tokens have {rows} rows, the base's {base_rows}: " + (
        f"rows from {base_rows} on are left out"
        if rows > base_rows
        else f"rows from {rows} on are the base's"
    )
    if left_out:
        note += f", {len(left_out)} token(s) among them ({_named(left_out)})"
    if not (tokens and base_tokens):
        lacking = base.role if tokens else expert.role
        note += f"; {lacking} has no tokenizer, so tokens are taken to be the same by their ids"
    tensors = dict(expert.checkpoint.tensors)
    for name, in_file in expert.names.items():
        is_table = name in base.names and _is_resized(name, base, expert)
        if is_table and (expert.shape(name)[0], base.shape(name)[0]) == (rows, base_rows):
            copies = [copy for copy, first in expert.copies.items() if first == name]
            for tensor in (in_file, *copies):
                if tensors[tensor].shape == expert.shape(name):
                    of_base = base.checkpoint.tensors[base.names[name]]
                    tensors[tensor] = _resized(tensors[tensor], of_base)
    checkpoint = dataclasses.replace(
        expert.checkpoint, tensors=tensors, notes=(*expert.checkpoint.notes, note)
    )
    return dataclasses.replace(expert, checkpoint=checkpoint, left_out=left_out)


def _is_resized(name: str, base: MatchedCheckpoint, expert: MatchedCheckpoint) -> bool:
    """Returns True for a parameter that has more or fewer rows than the base's, all else equal."""
    first, second = base.shape(name), expert.shape(name)
    return bool(first and second) and first[0] != second[0] and first[1:] == second[1:]


def _resized(info: TensorInfo, of_base: TensorInfo) -> TensorInfo:
    """Returns a tensor with as many rows as the base's; those that it lacks are the base's."""
    rows, base_rows = info.shape[0], of_base.shape[0]
    if rows > base_rows:
        return info.part(0, of_base.shape)
    row_shape = of_base.shape[1:]
    rest = of_base.part(rows * int(np.prod(row_shape)), (base_rows - rows, *row_shape))
    # Exactly the base's values, also where the expert is stored in fewer digits.
    dtype = info.dtype
    if dtype != of_base.dtype:
        is_double = np.float64 in (dtype, of_base.dtype)
        dtype = np.dtype(np.float64 if is_double else np.float32)
    return JoinedTensor(of_base.shape, dtype, info.file, info.start, (info, rest))


def _require_rows_of_config(base: MatchedCheckpoint, expert: MatchedCheckpoint) -> None:
    """Refuses a config with another number of tokens than the base's, unless a table has it."""
    claimed, of_base = (
        getattr(getattr(config, "text_config", config), "vocab_size", None)
        for config in (expert.checkpoint.config, base.checkpoint.config)
    )
    tables = [name for name in expert.names if matches(name, TOKEN_EMBEDDINGS)]
    rows = {expert.shape(name)[0] for name in tables}
    if claimed is not None and claimed != of_base and tables and claimed not in rows:
        raise InputError(
            f"{expert.role} ({expert.checkpoint.source}) has vocab_size {claimed} in its "
            f"config.json, and {tables[0]} has {expert.shape(tables[0])[0]} rows; config and "
            "weights must belong together"
        )


def _require_same_tokens(tokens: _Tokens, base_tokens: _Tokens, shared: int, where: str) -> None:
    """Refuses an expert whose ids mean other tokens than the base's.

    Args:
        tokens: The expert's tokens by id.
        base_tokens: The base's.
        shared: The number of rows that both models have.
        where: The expert, for messages.
    """
    differing = [
        number
        for number in sorted(tokens.keys() & base_tokens.keys())
        if number < shared and tokens[number] != base_tokens[number]
    ]
    if differing:
        shown = ", ".join(
            f"{number} is {tokens[number]!r} there and {base_tokens[number]!r} in the base"
            for number in differing[:_SHOWN]
        )
        raise InputError(
            f"{where} has another vocabulary than the base: {len(differing)} of {shared} ids "
            f"differ: {shown}{and_more(max(0, len(differing) - _SHOWN))}; tables of tokens can be "
            "merged only where ids mean the same tokens: leave it out"
        )


def _tokens(model: MatchedCheckpoint) -> _Tokens:
    """Returns a model's tokens by id; none without a tokenizer."""
    if not has_tokenizer(model.checkpoint):
        return {}
    vocabulary = load_tokenizer(model.checkpoint, model.role).get_vocab()
    return {number: token for token, number in vocabulary.items()}


def _named(tokens: Sequence[str]) -> str:
    shown = ", ".join(map(repr, tokens[:_SHOWN]))
    return f"{shown}{and_more(max(0, len(tokens) - _SHOWN))}"
