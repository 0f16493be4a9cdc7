"""The small files of a checkpoint beside its config and weights."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.tokenizer_files import has_tokenizer

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "*.model", "*.tiktoken", "chat_template*"),
)
_PROCESSOR_FILES = (
    *("preprocessor_config.json", "processor_config.json", "image_processor_config.json"),
)
_GENERATION_FILES = ("generation_config.json",)


def copy_assets(checkpoint: Checkpoint, others: Sequence[Checkpoint], folder: Path) -> None:
    """Copies the tokenizer, processor and generation settings of a checkpoint.

    Args:
        checkpoint: The checkpoint whose files are copied.
        others: Checkpoints to take the tokenizer or the processor from if it has none: the first
            one that has.
        folder: The folder to copy them to.
    """
    candidates = (checkpoint, *others)
    with_tokenizer = next(filter(has_tokenizer, candidates), checkpoint)
    with_processor = next(
        (candidate for candidate in candidates if _files(candidate, _PROCESSOR_FILES)), checkpoint
    )
    for file in (
        *_files(with_tokenizer, _TOKENIZER_FILES),
        *_files(with_processor, _PROCESSOR_FILES),
        *_files(checkpoint, _GENERATION_FILES),
    ):
        shutil.copyfile(file, folder / file.name)


def _files(checkpoint: Checkpoint, patterns: Sequence[str]) -> list[Path]:
    """Returns the files of a checkpoint that fit one of the patterns."""
    return [
        file
        for pattern in patterns
        for file in sorted(checkpoint.folder.glob(pattern))
        if file.is_file()
    ]
