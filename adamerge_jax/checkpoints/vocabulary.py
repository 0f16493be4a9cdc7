"""Tables of tokens with more or fewer rows than the base's: padded ones, and added tokens.

A row is a token, in the output layer as in the embeddings. A merge has the base's tables, to which
`with_rows_of` adds those of a model whose tokenizer it takes. Tokens that an expert has of them
are merged, and all others are the base's.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from adamerge_jax.checkpoints.composed import JoinedTensor
from adamerge_jax.checkpoints.config_file import Fields
from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.matching import TOKEN_EMBEDDINGS, MatchedCheckpoint
from adamerge_jax.checkpoints.peft import Expert, MatchedAdapter
from adamerge_jax.checkpoints.safetensors_file import TensorInfo
from adamerge_jax.checkpoints.tokenizer_files import has_tokenizer, load_tokenizer
from adamerge_jax.errors import InputError, and_more
from adamerge_jax.parameter_names import matches

log = logging.getLogger(__name__)

_Tokens = Mapping[int, str]
"""The tokens of a model by id."""

_TABLES = (*TOKEN_EMBEDDINGS, "lm_head.bias", "embed_out.bias")
"""Patterns of the names of parameters that have a row, or an entry, for each token."""

_SIZE = "vocab_size"
"""The field of a config with the number of rows."""

_SHOWN = 3
"""The number of tokens that a message names."""


def with_rows_of(
    base: Checkpoint, owner: Checkpoint, role: str
) -> tuple[Checkpoint, Mapping[int, str]]:
    """Adds to a base the rows of tokens that only the owner of the merge's tokenizer has.

    Args:
        base: The base.
        owner: The files of that model; of an adapter, the tables that it saved whole under their
            names in a model.
        role: Its role, for messages: `expert 'chat'`.

    Returns:
        The base, with the owner's rows behind its own, and the tokens of these rows by id. No row
        is read. Where the owner has no token beyond the base's rows, the base as it is, and none.

    Raises:
        InputError: An id means another token in the two tokenizers.
    """
    longer = {
        name: table
        for name, info in base.tensors.items()
        if matches(name, _TABLES)
        and (table := _table(owner, name)) is not None
        and table.shape[1:] == info.shape[1:]
        and table.shape[0] > info.shape[0]
    }
    sizes = {(table.shape[0], base.tensors[name].shape[0]) for name, table in longer.items()}
    if len(sizes) != 1:
        return base, {}  # two sizes are no vocabulary, and their shapes are refused
    ((rows, base_rows),) = sizes
    tokens = _tokens(owner, role)
    added = {number: token for number, token in tokens.items() if base_rows <= number < rows}
    if not added:
        return base, {}
    _require_same_tokens(tokens, _tokens(base, "base"), base_rows, f"{role} ({owner.source})")
    tensors = {name: _resized(base.tensors[name], table) for name, table in longer.items()}
    note = (
        f"rows of tokens from {base_rows} on are those of {role}, whose tokenizer the merge takes: "
        f"{len(added)} token(s) ({_named([added[number] for number in sorted(added)])})"
    )
    config = copy.deepcopy(base.config)
    config.get_text_config().vocab_size = rows
    extended = dataclasses.replace(
        base,
        config=config,
        config_fields=_with_size(base.config_fields, rows),
        tensors={**base.tensors, **tensors},
        notes=(*base.notes, note),
    )
    return extended, added


class TokenRows:
    """Gives tables of tokens as many rows as the base's have.

    Rows beyond those of the base are left out; where an expert has fewer, the last ones are the
    base's. No row is read. The checkpoint's notes say it, and a warning names tokens that the merge
    has no rows for. The base's tokenizer is read once, and only if an expert has other rows.

    Args:
        base: The base.
        added: The tokens by id of rows that are not of the base's own tokenizer; see
            `with_rows_of`.
    """

    def __init__(self, base: MatchedCheckpoint, added: Mapping[int, str]) -> None:
        self._base = base
        self._added = added

    def fit_model(self, expert: MatchedCheckpoint) -> MatchedCheckpoint:
        """Returns a whole model with as many rows in its tables as the base has.

        Raises:
            InputError: An id means another token in the two tokenizers, or the config says another
                number of tokens than there are rows.
        """
        _require_rows_of_config(self._base, expert)
        resized = self._resized_tables({name: expert.shape(name) for name in expert.names})
        if not resized:
            return expert
        checkpoint, left_out = self._with_note(expert, resized[0], expert.shape(resized[0])[0])
        tensors = dict(checkpoint.tensors)
        for name in resized:
            copies = [copy for copy, first in expert.copies.items() if first == name]
            for tensor in (expert.names[name], *copies):
                if tensors[tensor].shape == expert.shape(name):
                    tensors[tensor] = _resized(tensors[tensor], self._base.tensor(name))
        checkpoint = dataclasses.replace(checkpoint, tensors=tensors)
        return dataclasses.replace(expert, checkpoint=checkpoint, left_out=left_out)

    def fit_adapter(self, adapter: MatchedAdapter) -> MatchedAdapter:
        """Returns an adapter with as many rows as the base in tables that it saved or changes.

        An adapter that changes some of the tables alone has the rows of the base's own files, to
        which others may have been added; otherwise its shapes stay, to be refused.

        Raises:
            InputError: An id means another token in the two tokenizers.
        """
        tensors = dict(adapter.checkpoint.tensors)
        shapes = {name: adapter.product_shape(name) for name in adapter.factors}
        shapes |= {name: tensors[tensor].shape for name, tensor in adapter.saved.items()}
        resized = self._resized_tables(shapes)
        is_of_base = all(shapes[name] == self._own_shape(name) for name in resized)
        if not resized or not (is_of_base or self._tables <= {*resized}):
            return adapter
        checkpoint, left_out = self._with_note(adapter, resized[0], shapes[resized[0]][0])
        for name in resized:
            if name in adapter.saved:
                tensor = adapter.saved[name]
                tensors[tensor] = _resized(tensors[tensor], self._base.tensor(name))
        checkpoint = dataclasses.replace(checkpoint, tensors=tensors)
        return dataclasses.replace(
            adapter,
            checkpoint=checkpoint,
            left_out=left_out,
            resized=frozenset(name for name in resized if name in adapter.factors),
        )

    def _resized_tables(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Returns the parameters that have more or fewer rows than the base's, all else equal.

        None if they have several numbers of rows: that is no vocabulary, and their shapes are
        refused.
        """
        names = [
            name
            for name, shape in shapes.items()
            if name in self._base.names
            and matches(name, _TABLES)
            and shape
            and shape[0] != self._base.shape(name)[0]
            and shape[1:] == self._base.shape(name)[1:]
        ]
        sizes = {(shapes[name][0], self._base.shape(name)[0]) for name in names}
        return names if len(sizes) == 1 else []

    def _with_note(
        self, expert: Expert, table: str, rows: int
    ) -> tuple[Checkpoint, tuple[str, ...]]:
        """Returns an expert's checkpoint with a note on a table's rows, and the tokens left out."""
        where = f"{expert.role} ({expert.checkpoint.source})"
        base_rows = self._base.shape(table)[0]
        tokens, base_tokens = _tokens(expert.checkpoint, expert.role), self._base_tokens
        _require_same_tokens(tokens, base_tokens, min(rows, base_rows), where)
        left_out = tuple(tokens[number] for number in sorted(tokens) if number >= base_rows)
        if left_out:
            log.warning(
                "%s has %d token(s) that the base has no rows for (%s): they are left out of the "
                "merge, which has them where it takes this expert's tokenizer (tokenizer: TASK)",
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
            lacking = self._base.role if tokens else expert.role
            note += f"; {lacking} has no tokenizer, so tokens are taken to be the same by their ids"
        notes = (*expert.checkpoint.notes, note)
        return dataclasses.replace(expert.checkpoint, notes=notes), left_out

    @property
    def _tables(self) -> set[str]:
        """The tables of the base that have a row for each token."""
        return {name for name in self._base.names if matches(name, TOKEN_EMBEDDINGS)}

    def _own_shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a table in the base's own files."""
        table = self._base.tensor(name)
        return table.pieces[0].shape if isinstance(table, JoinedTensor) else table.shape

    @cached_property
    def _base_tokens(self) -> _Tokens:
        return {**_tokens(self._base.checkpoint, self._base.role), **self._added}


def _table(owner: Checkpoint, name: str) -> TensorInfo | None:
    """Returns a model's tensor of a name, which may have a prefix more or less; None without."""
    for other, info in owner.tensors.items():
        if other == name or other.endswith(f".{name}") or name.endswith(f".{other}"):
            return info
    return None


def _with_size(fields: Fields, rows: int) -> Fields:
    """Returns the fields of a config for tables of as many rows."""
    part = fields.get("text_config")
    if isinstance(part, dict):
        fields = fields | {"text_config": part | {_SIZE: rows}}
        if _SIZE not in fields:
            return fields
    return fields | {_SIZE: rows}


def _resized(info: TensorInfo, like: TensorInfo) -> TensorInfo:
    """Returns a tensor with as many rows as another; those that it lacks are the other's."""
    rows, wanted = info.shape[0], like.shape[0]
    if rows > wanted:
        return info.part(0, like.shape)
    row_shape = like.shape[1:]
    rest = like.part(rows * int(np.prod(row_shape)), (wanted - rows, *row_shape))
    # Exactly the other's values, also where this one is stored in fewer digits.
    dtype = info.dtype
    if dtype != like.dtype:
        is_double = np.float64 in (dtype, like.dtype)
        dtype = np.dtype(np.float64 if is_double else np.float32)
    return JoinedTensor(like.shape, dtype, info.file, info.start, (info, rest))


def _require_rows_of_config(base: MatchedCheckpoint, expert: MatchedCheckpoint) -> None:
    """Refuses a config with a number of tokens that no table has, unless base and expert agree."""
    claimed, of_base = (
        getattr(getattr(config, "text_config", config), "vocab_size", None)
        for config in (expert.checkpoint.config, base.checkpoint.config)
    )
    tables = [name for name in expert.names if matches(name, TOKEN_EMBEDDINGS)]
    rows = {expert.shape(name)[0] for name in tables}
    of_tables = {base.shape(name)[0] for name in tables if name in base.names}
    differs = claimed != of_base or rows != of_tables
    if claimed is not None and differs and tables and claimed not in rows:
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


def _tokens(checkpoint: Checkpoint, role: str) -> _Tokens:
    """Returns a model's tokens by id; none without a tokenizer."""
    if not has_tokenizer(checkpoint):
        return {}
    vocabulary = load_tokenizer(checkpoint, role).get_vocab()
    return {number: token for token, number in vocabulary.items()}


def _named(tokens: Sequence[str]) -> str:
    shown = ", ".join(map(repr, tokens[:_SHOWN]))
    return f"{shown}{and_more(max(0, len(tokens) - _SHOWN))}"
