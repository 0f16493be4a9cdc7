"""The tokenizer beside the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.errors import InputError, in_one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SIGNS = (
    ("tokenizer_config.json",),
    ("tokenizer.json",),
    ("vocab.txt",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("tokenizer.model",),
    ("sentencepiece.bpe.model",),
)
"""Groups of files; a folder with all files of a group has a tokenizer."""

# Files that are read in place of those that a tokenizer's class names.
_WHOLE = ("tokenizer.json", "tokenizer.*.json", "tokenizer.model*", "tekken.json", "tiktoken.model")


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Returns True if a tokenizer was saved with a checkpoint."""
    folder = checkpoint.folder
    return any(all((folder / name).is_file() for name in files) for files in _SIGNS)


def load_tokenizer(checkpoint: Checkpoint, role: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a checkpoint.

    Args:
        checkpoint: The checkpoint in whose folder it is.
        role: The role of the checkpoint, for messages: `base`, `expert 'trec'`.

    Raises:
        InputError: There is none, it cannot be read, or its vocabulary is missing.
    """
    from transformers import AutoTokenizer

    where = f"{role} ({checkpoint.source})"
    if not has_tokenizer(checkpoint):
        raise InputError(
            f"{where} has no tokenizer; save it there with tokenizer.save_pretrained(folder)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    except Exception as error:  # of transformers, of tokenizers, of libraries that they need
        raise InputError(f"{where}: its tokenizer cannot be read: {in_one_line(error)}") from error
    if not _has_vocabulary(tokenizer, checkpoint.folder):
        raise InputError(
            f"{where}: its tokenizer ({type(tokenizer).__name__}) has no vocabulary: the folder "
            f"lacks {' and '.join(tokenizer.vocab_files_names.values())}; save it there again with "
            "tokenizer.save_pretrained(folder)"
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
