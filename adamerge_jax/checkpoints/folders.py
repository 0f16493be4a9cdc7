"""Folders that appear when they are complete, or not at all."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adamerge_jax.errors import InputError, in_hand, shorten
from adamerge_jax.files.writing import flush_folder, partial_path

_TASK_NAME = re.compile(r"\w[\w.+-]*")

_LONGEST_NAME = 100
"""The longest name of a run or task in bytes: file systems take 255, and endings are added."""


@contextmanager
def new_folder(folder: str | Path, *, expected_bytes: int | None = None) -> Iterator[Path]:
    """Writes a folder under a temporary name, and gives it its own name at the end.

    When the block ends with an exception, an interrupt included, nothing is left behind.

    Args:
        folder: The folder to make; it may exist if it is empty.
        expected_bytes: The size of all files, to check first that the disk has room for it.

    Yields:
        The folder to write to: a hidden sibling of `folder`.

    Raises:
        InputError: `folder` is in use or cannot be made, or the disk is or becomes full.
    """
    folder = Path(folder).expanduser().resolve()
    require_new(folder, expected_bytes=expected_bytes)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_path(folder)
        partial.mkdir()
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror or error}); choose another folder"
        ) from error
    try:
        with in_hand(folder):
            yield partial
            _flush(partial)
            partial.rename(folder)
            flush_folder(folder.parent)
    except BaseException as error:
        written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        free = shutil.disk_usage(folder.parent).free
        shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(error):
            raise InputError(
                f"no space left while writing {folder}: {readable_size(written)} were written "
                f"(and are removed again) when {readable_size(free)} were free; free some, or "
                "write to another disk"
            ) from error
        raise


def require_writable(folder: Path) -> None:
    """Refuses a folder that cannot be made or written to; makes nothing.

    Raises:
        InputError: `folder` is a file, or no file can be made in it.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another folder to write to")
    parent = _nearest(folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        reason = "is not writable" if parent.is_dir() else "is a file"
        raise InputError(f"cannot write to {folder} ({parent} {reason}); choose another folder")


def require_new(folder: Path, *, expected_bytes: int | None = None) -> None:
    """Refuses a folder that is in use, or a disk that is too full; makes nothing.

    Args:
        folder: The folder to make; it may exist if it is empty.
        expected_bytes: The size of all files.

    Raises:
        InputError: `folder` is a file or not empty, cannot be made, or its disk is too full.
    """
    require_writable(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; choose another folder, or remove it first")
    if expected_bytes is not None:
        require_space(folder, expected_bytes)


def require_space(folder: Path, expected_bytes: int) -> None:
    """Refuses a folder whose disk has no room for the given number of bytes.

    Raises:
        InputError: With the free space.
    """
    free = shutil.disk_usage(_nearest(folder)).free
    if expected_bytes > free:
        raise InputError(
            f"not enough space for {folder}: {readable_size(expected_bytes)} will be written, "
            f"{readable_size(free)} are free; free some, or write to another disk"
        )


def require_run_name(name: str) -> None:
    """Refuses a name of a run that cannot be the name of a folder under `runs/`.

    Raises:
        InputError: It is a path, empty, too long, or has characters that are not printed.
    """
    is_path = "/" in name or "\\" in name or name in ("", ".", "..") or name != name.strip()
    if is_path or not name.isprintable() or name[0] == "-" or len(name.encode()) > _LONGEST_NAME:
        raise InputError(
            f"name: {shorten(repr(name))} cannot be the name of a folder; use printed characters "
            f"without / and \\, at most {_LONGEST_NAME} bytes of them, and give a path as --out"
        )


def require_task_name(task: str) -> None:
    """Refuses a task name that cannot be the name of a folder under `tasks/`.

    Raises:
        InputError: It is empty, too long, or has other characters than a folder's name should.
    """
    if not _TASK_NAME.fullmatch(task) or len(task.encode()) > _LONGEST_NAME:
        raise InputError(
            f"task name {shorten(repr(task))} cannot be the name of a folder; use letters, digits "
            f"and any of . _ + - after the first, at most {_LONGEST_NAME} bytes"
        )


def require_possible_path(path: str) -> str:
    """Returns a path, or refuses one that no file system has.

    Raises:
        InputError: It is empty, too long, or holds a byte 0.
    """
    longest = max(map(len, os.fsencode(path).split(b"/")))
    if not path or "\0" in path or longest > 255 or len(os.fsencode(path)) > 4096:
        raise InputError(f"{shorten(repr(path))} is no path: empty, too long, or with a byte 0")
    return path


def _nearest(folder: Path) -> Path:
    """Returns the folder, or the nearest one above it that exists."""
    return next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())


def readable_size(size: int) -> str:
    """Returns a number of bytes in the largest unit that fits: `1.3 GB`."""
    for power, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= power:
            return f"{size / power:.1f} {unit}"
    return f"{size} bytes"


def _flush(folder: Path) -> None:
    """Writes all files to the disk before the rename, so that a power cut cannot leave a half."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        else:
            flush_folder(file)
    flush_folder(folder)


def is_disk_full(error: BaseException) -> bool:
    """Returns True if an exception says that there is no space left to write to."""
    # safetensors and tensorstore report the system's error as text in errors of their own.
    return getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)
