"""The user's cache folder."""

import contextlib
import functools
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from adamerge_jax.errors import InputError
from adamerge_jax.files.json_object import read_object
from adamerge_jax.files.writing import is_partial, write_whole

log = logging.getLogger(__name__)


def cache_folder(name: str) -> Path:
    """Returns a folder for things that can be made again; it need not be there.

    It is under `adamerge_jax` in `XDG_CACHE_HOME`, or in `~/.cache`.

    Raises:
        InputError: The user has no home folder.
    """
    # The standard says that a relative path there is to be ignored.
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        try:
            cache = Path.home() / ".cache"
        except RuntimeError as error:  # an id of a container, that no user has
            raise InputError(
                "there is no home folder for the cache; set XDG_CACHE_HOME to the absolute path of "
                "a folder that this process may write to"
            ) from error
    return cache / "adamerge_jax" / name


def keep_in_cache(file: Path, content: str, most_bytes: int) -> None:
    """Writes a file of the cache, and removes the oldest of its folder where these are too large.

    Args:
        file: The file; its folder is made.
        content: Its content.
        most_bytes: The size of all files of the folder together.

    Raises:
        OSError: The file cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, content)
    by_age = []
    for other in file.parent.iterdir():
        with contextlib.suppress(OSError):  # another process may remove it, too
            status = other.stat()
            if other.is_file() and not is_partial(other):
                by_age.append((other != file, -status.st_mtime_ns, status.st_size, other))
    total = 0
    for _, _, size, other in sorted(by_age):
        total += size
        if total > most_bytes and other != file:
            other.unlink(missing_ok=True)


def keep_if_possible(
    file: Path, content: str, *, largest: int, most_bytes: int, words: str, otherwise: str
) -> None:
    """Writes a file of the cache as `keep_in_cache` does; a run goes on without it.

    Args:
        file: The file.
        content: Its content; one that is too large is not kept.
        largest: The size of the largest file that is kept.
        most_bytes: The size of all files of the folder together.
        words: The content in words, for the warning where it cannot be written.
        otherwise: What another run does without it, for the warning.
    """
    if len(content.encode()) > largest:
        return
    try:
        keep_in_cache(file, content, most_bytes)
    except OSError as error:
        reason = error.strerror or error
        log.warning(f"cannot keep {words} in {file.parent} ({reason}); {otherwise}")


def read_from_cache(file: Path, largest: int) -> dict[str, Any] | None:
    """Returns the JSON object in a file of the cache; None where there is no file.

    Args:
        file: The file.
        largest: The size of the largest file that is read.

    Raises:
        InputError: It is larger, or holds no JSON object.
        OSError: It cannot be read.
    """
    if not file.is_file():
        return None
    if file.stat().st_size > largest:
        raise InputError(f"it has over {largest:,} bytes")
    return read_object(file)


@functools.cache
def code_digest() -> str:
    """Returns a digest of this package's code, for what another version may compute otherwise."""
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
