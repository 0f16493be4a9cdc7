"""A folder that is there as a whole or not at all, whatever happens while it is written."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adamerge_jax.errors import InputError


@contextmanager
def new_folder(folder: str | Path, *, expected_bytes: int | None = None) -> Iterator[Path]:
    """Writes a folder under a temporary name, and gives it its own name at the end.

    When the block ends with an exception, an interrupt included, nothing is left behind.

    Args:
        folder: The folder to make; it may exist if it is empty.
        expected_bytes: How much will be written, to find out first whether it fits.

    Yields:
        The folder to write to: a hidden sibling of `folder`.

    Raises:
        InputError: `folder` is in use or cannot be made, or the disk is or becomes full.
    """
    folder = Path(folder).expanduser().resolve()
    require_new(folder, expected_bytes=expected_bytes)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A sibling, because a rename is atomic only within one file system.
        partial = folder.with_name(f".{folder.name}.partial-{secrets.token_hex(4)}")
        partial.mkdir()
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror or error}); choose another folder"
        ) from error
    try:
        yield partial
        _flush(partial)
        partial.rename(folder)
    except BaseException as error:
        written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        free = shutil.disk_usage(folder.parent).free
        shutil.rmtree(partial, ignore_errors=True)
        if _is_disk_full(error):
            raise InputError(
                f"no space left while writing {folder}: {readable_size(written)} were written "
                f"(and are removed again) when {readable_size(free)} were free; free some, or "
                "write to another disk"
            ) from error
        raise


def require_new(folder: Path, *, expected_bytes: int | None = None) -> None:
    """Refuses a folder that is in use, or a disk that is too full; makes nothing.

    Args:
        folder: The folder to make; it may exist if it is empty.
        expected_bytes: How much will be written.

    Raises:
        InputError: `folder` is a file or not empty, cannot be made, or its disk is too full.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another folder to write to")
    there = _nearest(folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "is not writable" if there.is_dir() else "is a file"
        raise InputError(f"cannot write to {folder} ({there} {reason}); choose another folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; choose another folder, or remove it first")
    if expected_bytes is not None:
        require_space(folder, expected_bytes)


def require_space(folder: Path, expected_bytes: int) -> None:
    """Refuses a folder whose disk is too full for what will be written to it.

    Raises:
        InputError: Says how much is free.
    """
    free = shutil.disk_usage(_nearest(folder)).free
    if expected_bytes > free:
        raise InputError(
            f"not enough space for {folder}: {readable_size(expected_bytes)} will be written, "
            f"{readable_size(free)} are free; free some, or write to another disk"
        )


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())


def readable_size(size: int) -> str:
    """A number of bytes as people say it: `1.3 GB`."""
    for power, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= power:
            return f"{size / power:.1f} {unit}"
    return f"{size} bytes"


def _flush(folder: Path) -> None:
    """Has everything on the disk before the rename, so that a power cut cannot leave half of it."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def _is_disk_full(error: BaseException) -> bool:
    # safetensors and tensorstore report the system's error as text in errors of their own.
    return getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)
