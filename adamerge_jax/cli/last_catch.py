"""The last catch: an exception that nobody foresaw, as one line and an exit status.

Readers refuse what they know to be wrong with an `InputError`. What is left has three kinds: the
system refuses (a full disk, no permission, no memory), a file in hand has something that no reader
expected, or the fault is ours. Only the last one has exit status 1.
"""

import errno
import os
import sys
import tempfile
import traceback
from importlib.metadata import version
from pathlib import Path

from adamerge_jax.checkpoints.folders import is_disk_full
from adamerge_jax.errors import file_in_hand, in_one_line

TRACEBACK_FILE = "traceback.txt"

_RECIPE_FILE = "recipe.yaml"
"""The file that makes a folder a run folder; importing its room would load JAX."""

_NO_SPACE = "free some space, or write to another disk"
_NOT_ALLOWED = "change its permissions, or choose another place"

_ADVICE = {
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: f"your quota is used up: {_NO_SPACE}",
    errno.EFBIG: "files are limited here (ulimit -f, or the file system): raise the limit",
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.EROFS: "it is on a disk that can only be read: choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead to themselves: give the file itself",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.EIO: "the disk, or the connection to it, fails: copy the file to another one",
}
"""Advice by the number of the system's error."""

_EXPLAINED = (errno.ENAMETOOLONG, errno.ELOOP)
"""Errors of a name alone: a traceback would add nothing."""


def explain(error: Exception, run_folder: Path | None) -> tuple[str, int]:
    """Explains an exception, and writes its traceback to a file.

    Args:
        error: The exception.
        run_folder: The folder of the run, which gets the traceback if it is there.

    Returns:
        The line to print, which says where the traceback is, and the exit status: 2 where files or
        the system are to blame, else 1.
    """
    reason, status = _reason(error)
    if isinstance(error, OSError) and error.errno in _EXPLAINED and error.filename is not None:
        return f"error: {reason}", status
    where = _write_traceback(error, run_folder)
    return f"error: {reason}; the traceback is {f'in {where}' if where else 'lost'}", status


def _reason(error: Exception) -> tuple[str, int]:
    """Returns the reason of an exception, and the exit status."""
    file = file_in_hand(error)
    named = f"{type(error).__name__}: {in_one_line(error)}"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        in_hand = f"{file}: " if file else ""
        return f"{in_hand}out of memory; `adamerge plan` says how much a run needs", 2
    if isinstance(error, OSError) and error.errno is not None:
        advice = _ADVICE.get(error.errno)
        message = f"{file or 'the system'}: {os.strerror(error.errno)}"
        return f"{message}; {advice}" if advice else message, 2
    if is_disk_full(error):
        return f"{file or 'the system'}: {in_one_line(error)}; {_NO_SPACE}", 2
    if file is None:
        return f"adamerge failed ({named}), which is a fault of its own: please report it", 1
    if isinstance(error, UnicodeError):
        return f"{file} is no text in UTF-8 ({in_one_line(error)}); save it in UTF-8", 2
    if isinstance(error, RecursionError):
        return f"{file} is nested too deeply to be read; make it anew", 2
    return f"{file} cannot be used ({named}); make it anew, or report this if it is right", 2


def _write_traceback(error: Exception, run_folder: Path | None) -> Path | None:
    """Writes the traceback to the run folder, or to a temporary file; returns where it is."""
    text = (
        f"adamerge_jax {version('adamerge_jax')}, Python {sys.version.split()[0]}, "
        f"{sys.platform}\n\n{''.join(traceback.format_exception(error))}"
    )
    content = text.encode(errors="backslashreplace")
    try:
        if run_folder is not None and (run_folder / _RECIPE_FILE).is_file():
            file = run_folder / TRACEBACK_FILE
            file.write_bytes(content)
            return file
    except OSError:
        pass  # The disk may be what has failed.
    try:
        descriptor, name = tempfile.mkstemp("-traceback.txt", "adamerge-")
        with open(descriptor, "wb") as stream:
            stream.write(content)
        return Path(name)
    except OSError:
        return None
