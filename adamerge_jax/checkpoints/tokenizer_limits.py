"""The limits of a stranger's tokenizer: what its steps make of a text, before any text is read.

A few rules that write a letter many times, one after the other, fill any memory, and the library
that runs them ends the process then. So the steps are looked at first.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adamerge_jax.errors import InputError, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LARGEST_FILE = 2**28
"""Bytes of the largest file: the vocabularies of a million tokens have 60 million."""

_MOST_GROWTH = 10_000
"""The number of times that the steps may make a text longer; those in use make it a few times."""

_BYTE_LEVEL = 4
"""The bytes of a character, each of which becomes one."""

_PARTS = ("normalizers", "pretokenizers", "processors", "decoders")
"""The fields in which a sequence of steps has them."""

Step = dict[str, Any]
"""The settings of a step as `tokenizers` writes them to JSON."""


def require_small(files: Sequence[Path], where: str) -> None:
    """Refuses files of a tokenizer that are too large for one: libraries read them as a whole.

    Raises:
        InputError: With the first such file.
    """
    for file in files:
        if (size := file.stat().st_size) > _LARGEST_FILE:
            raise InputError(
                f"{where}: {file.name} has {size:,} bytes, and the largest files of tokenizers "
                f"have less than {_LARGEST_FILE:,}; copy or download it again"
            )


def require_bounded(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuses a tokenizer that may make any amount of tokens of a text, or other ones each time.

    Args:
        tokenizer: The tokenizer; what is no tokenizer of the library `tokenizers` has no such
            steps.
        where: Its model, for messages.

    Raises:
        InputError: With the step.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    for parts in ((backend.normalizer, backend.pre_tokenizer), (backend.decoder,)):
        _require_little_growth([step for part in parts for step in _steps(part)], where)
    for step in _steps(backend.post_processor):
        if step["type"] == "TemplateProcessing":
            _require_each_text_once(step, where)
    if getattr(backend.model, "dropout", None):
        raise InputError(
            f"{where}: its tokenizer makes other tokens of a text each time (dropout "
            f"{backend.model.dropout:g} in tokenizer.json), so that no merge could be made again; "
            "set dropout to null there"
        )


def _steps(part: Any) -> Iterator[Step]:
    """Yields the steps of a part of a tokenizer, those of sequences one by one."""
    if part is not None:
        yield from _flat(json.loads(part.__getstate__()))


def _flat(step: Step) -> Iterator[Step]:
    inner = next((step[name] for name in _PARTS if name in step), None)
    if inner is None:
        yield step
    for part in inner or ():
        yield from _flat(part)


def _require_little_growth(steps: Sequence[Step], where: str) -> None:
    """Refuses steps that together make a text far longer.

    A rule for a text that holds none of what earlier rules wrote finds only what they left, so
    that their growths are no product: many tokenizers have a long list of such rules.
    """
    growth, written, is_known = 1, set[str](), True
    for step in steps:
        more = _growth(step)
        pattern = step["pattern"].get("String", "") if step["type"] == "Replace" else ""
        is_apart = bool(pattern) and is_known and not written & set(pattern)
        growth = max(growth, more) if is_apart else growth * more
        written |= set(step.get("content", step.get("prepend", "")))
        # These write letters of their own.
        is_known = is_known and step["type"] not in ("ByteLevel", "Precompiled")
        if growth > _MOST_GROWTH:
            raise InputError(
                f"{where}: its tokenizer may make a text more than {_MOST_GROWTH:,} times as long "
                f"({shorten(json.dumps(step), 60)}); use the tokenizer of the model that it was "
                "trained from"
            )


def _growth(step: Step) -> int:
    """Returns the number of times that a step makes a text longer at most, and at least 1."""
    if step["type"] == "Replace":
        content, text = step["content"], step["pattern"].get("String")
        # A regular expression may match between any two letters.
        return max(1, -(-len(content) // len(text)) if text else 1 + len(content))
    if step["type"] == "Prepend":
        return 1 + len(step["prepend"])
    if step["type"] == "ByteLevel":
        return _BYTE_LEVEL
    if step["type"] == "Precompiled":
        # The size of a table of letters, the table, and what letters become, one after the other.
        content = base64.b64decode(step["precompiled_charsmap"])
        texts = content[4 + int.from_bytes(content[:4], "little") :].split(b"\0")
        return max(1, *map(len, texts))
    return 1


def _require_each_text_once(step: Step, where: str) -> None:
    """Refuses a template that leaves a text out, or repeats it behind the limit of its tokens."""
    for form, expected in (("single", ["A"]), ("pair", ["A", "B"])):
        texts = [part["Sequence"]["id"] for part in step[form] if "Sequence" in part]
        if sorted(texts) != expected:
            raise InputError(
                f"{where}: its tokenizer's template of special tokens ({form}) has "
                f"{len(texts)} texts; expected {' and '.join(expected)}, each once"
            )
