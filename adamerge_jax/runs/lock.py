"""The lock of a run folder: one process writes to it, and a second one is told which."""

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from adamerge_jax.checkpoints.folders import require_writable
from adamerge_jax.errors import InputError
from adamerge_jax.runs.files import LOCK_FILE

_UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
"""The errors of file systems that have no locks, such as some that are shared by a cluster."""


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Holds a folder until the block ends, and makes it if it is not there.

    The system gives the lock back when the process ends, however it does. Where the file system has
    no locks there is a warning, and nothing stops a second process.

    Args:
        folder: The folder; what was made of it is removed again if nothing is in it at the end.

    Raises:
        InputError: Another process holds it, or it cannot be written to.
    """
    require_writable(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    file = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(file)
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror or error}); choose another folder"
        ) from error
    try:
        holder = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().isoformat(sep=" ", timespec="seconds"),
        }
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(holder).encode())
        yield
    finally:
        # Before the lock is given back, or another process could get a lock on a removed file.
        file.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def _lock(file: Path) -> int:
    """Returns the descriptor of a locked file."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                logging.getLogger(__name__).warning(
                    "the file system of %s has no locks (%s): start nothing else in this folder "
                    "before this run has ended",
                    file.parent,
                    error.strerror,
                )
                return descriptor
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise InputError(_in_use(file)) from error
            raise
        # The holder before may have removed the file since it was opened.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        os.close(descriptor)


def _in_use(file: Path) -> str:
    """Describes who holds a folder."""
    try:
        holder = json.loads(file.read_text())
        by = f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        by = "another process"  # which has not written more yet
    return (
        f"{file.parent} is in use by {by}; wait until it has ended, end it, or choose another "
        "folder"
    )
