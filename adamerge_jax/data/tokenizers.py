"""The tokenizer of a merge: there is one, so every expert must have learned with the same."""

from __future__ import annotations

import filecmp
import logging
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.matching import MatchedCheckpoint
from adamerge_jax.checkpoints.peft import Expert
from adamerge_jax.checkpoints.tokenizer_files import (
    has_tokenizer,
    load_tokenizer,
    tokenizer_files,
)
from adamerge_jax.errors import InputError, and_more, in_one_line

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_SPECIAL = ("bos_token", "eos_token", "unk_token")

_SHOWN = 3
"""The number of differing tokens that a message names."""


def tokenizer_owner(models: Mapping[str, Expert], chosen: str | None) -> Expert | None:
    """Returns the model whose tokenizer the merge takes: the chosen one, else the first with one.

    Args:
        models: The base as `base`, then the experts by task.
        chosen: `base` or a task, or None.

    Raises:
        InputError: There is no such model, it has no tokenizer, or one with tokens that the merge
            has no rows for.
    """
    if chosen is None:
        owner = next((m for m in models.values() if has_tokenizer(m.checkpoint)), None)
    elif chosen not in models:
        raise InputError(f"tokenizer: {chosen!r} is none of {', '.join(models)}")
    elif not has_tokenizer(models[chosen].checkpoint):
        raise InputError(f"tokenizer: {chosen} ({models[chosen].checkpoint.source}) has none")
    else:
        owner = models[chosen]
    if owner is not None and owner.left_out:
        advice = (
            "name its task for the merge to have them (tokenizer: TASK)"
            if chosen is None
            else "put the base's tokenizer beside its weights, and choose it (tokenizer: base)"
        )
        raise InputError(
            f"the tokenizer of {owner.role} ({owner.checkpoint.source}) has {len(owner.left_out)} "
            f"token(s) that the merge has no rows for, {owner.left_out[0]!r} first: it has the "
            f"base's tables; {advice}"
        )
    return owner


def find_tokenizer(
    models: Mapping[str, Expert], chosen: str | None = None
) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer of the merge, or None if no model brings one.

    Those of the other whole experts are compared with it; an adapter is one of the base's. Chat
    templates may differ, and so may the token that pads: it is never part of a text. Where the
    recipe chose a tokenizer, other special tokens are no error either, nor tokens that it has in
    free rows of the embeddings and another model lacks.

    Args:
        models: The base as `base`, then the experts by task.
        chosen: `base` or a task, or None for the first that has one.

    Raises:
        InputError: One cannot be read, or an expert has another vocabulary or other special
            tokens.
    """
    owner = tokenizer_owner(models, chosen)
    if owner is None:
        return None
    tokenizer = load_tokenizer(owner.checkpoint, owner.role)
    _require_length(tokenizer, f"{owner.role} ({owner.checkpoint.source})")
    reference = "the base" if owner is models["base"] else owner.role
    for model in models.values():
        if (
            model is not owner
            and isinstance(model, MatchedCheckpoint)
            and has_tokenizer(model.checkpoint)
            and not _same_files(owner.checkpoint, model.checkpoint)
        ):
            where = f"{model.role} ({model.checkpoint.source})"
            other = load_tokenizer(model.checkpoint, model.role)
            _require_same(
                tokenizer, other, where, reference, left_out=model.left_out, strict=chosen is None
            )
    return tokenizer


def _same_files(first: Checkpoint, second: Checkpoint) -> bool:
    """Returns whether two checkpoints have one tokenizer byte by byte: none need be loaded."""
    names = [
        [file.relative_to(checkpoint.folder) for file in tokenizer_files(checkpoint)]
        for checkpoint in (first, second)
    ]
    return names[0] == names[1] and all(
        filecmp.cmp(first.folder / name, second.folder / name, shallow=False) for name in names[0]
    )


def _require_same(
    tokenizer: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    where: str,
    reference: str,
    *,
    left_out: Collection[str],
    strict: bool,
) -> None:
    """Refuses an expert's tokenizer whose tokens are others than those of the reference.

    Args:
        tokenizer: The tokenizer of the merge.
        other: The expert's.
        where: The expert, for messages.
        reference: The model that the tokenizer of the merge is of.
        left_out: The expert's tokens that the merge has no rows for.
        strict: False if the recipe chose the tokenizer.
    """
    ids, other_ids = tokenizer.get_vocab(), other.get_vocab()
    padding = {tokenizer.pad_token, other.pad_token}
    differing = []
    if ids != other_ids:
        # In the order of their ids, whichever of the two they are in.
        tokens = sorted({**other_ids, **ids}.items(), key=lambda item: (item[1], item[0]))
        differing = [
            token
            for token, _ in tokens
            if ids.get(token) != other_ids.get(token) and token not in padding
        ]
    beyond = [token for token in differing if token in left_out and token not in ids]
    if not strict:  # texts are read without them, as the merge reads them
        differing = [token for token in differing if token not in beyond]
    if differing and not strict and not any(token in other_ids for token in differing):
        log.warning("%s lacks %d token(s) of %s, which are kept", where, len(differing), reference)
        differing = []
    if differing:
        more = and_more(max(0, len(differing) - _SHOWN))
        shown = ", ".join(
            f"{token!r} is {_place(other_ids, token)} there and {_place(ids, token)} in {reference}"
            for token in differing[:_SHOWN]
        )
        advice = "; all models of a merge must have one tokenizer"
        if len(beyond) == len(differing):
            advice = (
                "; the merge has the base's rows and none for them: give it the expert's "
                "(tokenizer: TASK, the name of its task), say that texts are read without them "
                "(tokenizer: base), or leave the expert out"
            )
        raise InputError(
            f"{where} has another vocabulary than {reference}: {len(differing)} token(s) differ: "
            f"{shown}{more}{advice}"
        )
    for name in _SPECIAL:
        if getattr(other, name) != getattr(tokenizer, name):
            difference = (
                f"{where} has {name} {getattr(other, name)!r}, {reference} has "
                f"{getattr(tokenizer, name)!r}"
            )
            if strict:
                raise InputError(
                    f"{difference}; the merge has one tokenizer: say in the recipe whose it takes "
                    "(tokenizer: base, or a task)"
                )
            log.warning("%s: the merge has the latter", difference)
    if other.pad_token != tokenizer.pad_token:
        log.warning(
            "%s has pad_token %r, %s has %r: the merge has the latter",
            where,
            other.pad_token,
            reference,
            tokenizer.pad_token,
        )
    if other.chat_template != tokenizer.chat_template:
        log.info("%s has another chat template than %s, which is used", where, reference)


def _place(ids: dict[str, int], token: str) -> str:
    return str(ids[token]) if token in ids else "missing"


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] | Sequence[Sequence[str]],
    where: str,
    *others: Any,
    **options: Any,
) -> BatchEncoding:
    """Returns what a tokenizer makes of texts.

    Args:
        tokenizer: The tokenizer.
        texts: The texts, or the words of each.
        where: The beginning of error messages.
        *others: The second texts of pairs.
        **options: Options of the tokenizer.

    Raises:
        InputError: The tokenizer fails, e.g. for want of its token for unknown words.
    """
    try:
        # Long texts are cut later; without `verbose=False` it warns of them.
        return tokenizer(texts, *others, verbose=False, **options)
    except (KeyboardInterrupt, SystemExit):
        raise
    # Its own errors are of many types; where its Rust part fails, none of them is an `Exception`.
    except BaseException as error:
        raise InputError(
            f"{where}: the tokenizer ({type(tokenizer).__name__}) cannot read the texts: "
            f"{in_one_line(error)}; check its files"
        ) from error


def padding_of(tokenizer: PreTrainedTokenizerBase, vocabulary: int | None = None) -> int:
    """Returns the token that pads: masked, so that any token of the model will do.

    Args:
        tokenizer: The tokenizer; many have no token for padding.
        vocabulary: Number of the model's tokens: a token for padding may have been added behind
            them.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(
        token
        for token in candidates
        if token is not None and (vocabulary is None or token < vocabulary)
    )


def longest_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the number of tokens of the longest text that a tokenizer is for."""
    return int(min(tokenizer.model_max_length, sys.maxsize))


def _require_length(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuses a tokenizer whose longest text has no length."""
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest >= 2:
        raise InputError(
            f"{where}: model_max_length in its tokenizer_config.json is {longest!r}; expected the "
            "number of tokens of the longest text, at least 2, or no such field"
        )
