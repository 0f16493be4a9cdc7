"""The tokenizer beside the weights of a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.tokenizer_limits import require_bounded, require_small
from adamerge_jax.errors import InputError, in_one_line
from adamerge_jax.files.json_object import read_object_if_there

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_SIGNS = (
    ("tokenizer_config.json",),
    ("tokenizer.json",),
    ("vocab.txt",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("tokenizer.model",),
    ("sentencepiece.bpe.model",),
    ("tekken.json",),
)
"""Groups of files; a folder with all files of a group has a tokenizer."""

CONFIG_FILE = "tokenizer_config.json"

_COMMON = (
    *("tokenizer.json", "tokenizer.*.json", CONFIG_FILE, "special_tokens_map.json"),
    *("added_tokens.json", "vocab.txt", "vocab.json", "merges.txt"),
    *("*.model", "*.tiktoken", "*.codes", "*.spm", "tekken.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
"""Patterns of files that tokenizers of any class may have; those of a class are added to them."""

# Files that are read in place of those that a tokenizer's class names.
_WHOLE = ("tokenizer.json", "tokenizer.*.json", "tokenizer.model*", "tekken.json", "tiktoken.model")


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Returns True if a tokenizer was saved with a checkpoint."""
    folder = checkpoint.folder
    return any(all((folder / name).is_file() for name in files) for files in _SIGNS)


def tokenizer_files(checkpoint: Checkpoint) -> list[Path]:
    """Returns the files of a checkpoint's tokenizer, chat templates included.

    They are those that any tokenizer may have and those that the class of this one names: a
    PhoBERT has `bpe.codes`. A name in a file of the checkpoint is never taken for a path.
    """
    if not has_tokenizer(checkpoint):
        return []
    patterns = {*_COMMON, *_files_of_class(checkpoint)}
    files = {file for pattern in patterns for file in checkpoint.folder.glob(pattern)}
    return sorted(file for file in files if file.is_file() and file.suffix != ".py")


def is_known_class(name: Any) -> bool:
    """Returns True if a name in a file is that of a tokenizer of `transformers`."""
    return _class_of(name) is not None


def _files_of_class(checkpoint: Checkpoint) -> Iterator[str]:
    """Yields the names of files that the class of a checkpoint's tokenizer reads."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    for name in (
        _tokenizer_config(checkpoint).get("tokenizer_class"),
        checkpoint.config_fields.get("tokenizer_class"),
        TOKENIZER_MAPPING_NAMES.get(checkpoint.config_fields.get("model_type", "")),
    ):
        yield from getattr(_class_of(name), "vocab_files_names", {}).values()


def _class_of(name: Any) -> type | None:
    """Returns the tokenizer class of a name, None if `transformers` has none that can be read."""
    if not isinstance(name, str) or not name.isidentifier():
        return None
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    try:
        tokenizer_class = tokenizer_class_from_name(name)
        return tokenizer_class if hasattr(tokenizer_class, "vocab_files_names") else None
    except ImportError:  # a library that only some tokenizers need
        return None


def _tokenizer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    file = checkpoint.folder / CONFIG_FILE
    return read_object_if_there(file)


def load_tokenizer(checkpoint: Checkpoint, role: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a checkpoint.

    Args:
        checkpoint: The checkpoint in whose folder it is.
        role: The role of the checkpoint, for messages: `base`, `expert 'trec'`.

    Raises:
        InputError: There is none, it cannot be read, its vocabulary is missing, or its steps have
            no bound.
    """
    from transformers import AutoTokenizer

    where = f"{role} ({checkpoint.source})"
    if not has_tokenizer(checkpoint):
        raise InputError(
            f"{where} has no tokenizer; save it there with tokenizer.save_pretrained(folder)"
        )
    require_small(tokenizer_files(checkpoint), where)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except Exception as error:  # of transformers, of tokenizers, of libraries that they need
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{where}: its tokenizer is code of its own (auto_map in {CONFIG_FILE}), which is "
                "never run; save it there as one of transformers, or give another tokenizer"
            ) from error
        raise InputError(f"{where}: its tokenizer cannot be read: {in_one_line(error)}") from error
    if not _has_vocabulary(tokenizer, checkpoint.folder):
        raise InputError(
            f"{where}: its tokenizer ({type(tokenizer).__name__}) has no vocabulary: the folder "
            f"lacks {' and '.join(tokenizer.vocab_files_names.values())}; save it there again with "
            "tokenizer.save_pretrained(folder)"
        )
    require_bounded(tokenizer, where)
    if _tokenizer_config(checkpoint).get("auto_map"):
        log.warning(
            "%s: its tokenizer names code of its own (auto_map), which is never run: it is read as "
            "a %s of transformers",
            where,
            type(tokenizer).__name__,
        )
    return tokenizer


def _has_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Returns True if a folder has the files of a tokenizer's vocabulary.

    If there are none, `transformers` makes a tokenizer of a few special tokens, to which all texts
    are unknown.
    """
    # Some classes count their settings among these files.
    vocabulary = [
        name
        for kind, name in tokenizer.vocab_files_names.items()
        if kind != "tokenizer_config_file"
    ]
    if not vocabulary:
        return True  # its tokens are bytes or characters, which no file lists
    return any(
        file.is_file() for pattern in (*vocabulary, *_WHOLE) for file in folder.glob(pattern)
    )
