"""Files that are there as a whole or not at all, whenever the process or the machine ends."""

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

_PARTIAL = ".*.partial-*"


def write_whole(file: str | Path, content: bytes | str) -> None:
    """Writes a file, or writes it anew: it has the old content or the new one, never a part.

    Args:
        file: The file. Its folder must be there.
        content: Its content; a text is written in UTF-8.
    """
    file = Path(file)
    partial = partial_path(file)
    try:
        with partial.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            # Before the rename, or a power cut could leave the new name with nothing in it.
            os.fsync(stream.fileno())
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush_folder(file.parent)


def partial_path(target: Path) -> Path:
    """Returns a new name beside a file or folder, under which it grows until it is whole.

    A sibling, because a rename is atomic only within one file system.
    """
    # A name may have 255 bytes, and a character four of them.
    return target.with_name(f".{target.name[:50]}.partial-{secrets.token_hex(4)}")


def remove_partial(folder: Path) -> None:
    """Removes what killed processes have left half written, in a folder and in those below it.

    Args:
        folder: A folder that no other process writes to.
    """
    for leftover in (*folder.rglob(_PARTIAL), *folder.glob("*.orbax-checkpoint-tmp*")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def is_partial(path: Path) -> bool:
    """Returns True for the name of something that is half written."""
    return path.match(_PARTIAL) or path.match("*.orbax-checkpoint-tmp*")


def remove_folder(folder: Path) -> None:
    """Removes a folder with all that is in it, such that it is never there in part."""
    partial = partial_path(folder)
    try:
        folder.rename(partial)
    except FileNotFoundError:
        return
    flush_folder(folder.parent)
    shutil.rmtree(partial, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Writes the names in a folder to the disk, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
