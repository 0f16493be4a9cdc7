"""The run of a bad input, in this process, and what is wrong with the way in which it ended."""

import io
import os
import shlex
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType

import pytest

from adamerge_jax.cli import main as cli
from adamerge_jax.pipeline import run_learn
from tests.bad_inputs.bad import Bad
from tests.bad_inputs.suites import copy_suite

LONGEST = 10
"""Seconds of the processor after which a run hangs; a busy machine may take longer for them."""

LONGEST_WAIT = 100
"""Seconds after which a run hangs, whatever it waits for."""


class Accepted(BaseException):
    """The end of a command that has found nothing wrong and would learn."""


class Hang(BaseException):
    """The end of a command that takes too long."""


def faults_of(bad: Bad, suite: Path, folder: Path) -> list[str]:
    """Runs the command of a bad input; returns what is wrong with its end, nothing if all is right.

    Args:
        bad: The bad input.
        suite: The suite that it is made of.
        folder: A new folder to run it in.
    """
    root = copy_suite(suite, folder / "case")
    bad.damage(root)
    temporary = folder / "temporary"
    temporary.mkdir()
    before = _files(folder)
    status, error = outcome(bad.command, root, temporary)
    faults = []
    if status != 2:
        faults.append(f"ends with {status}")
    lines = error.splitlines()
    if len(lines) != 1 or not lines[0].startswith("error: "):
        faults.append(f"says {len(lines)} lines: {error[:300]!r} ... {error[-200:]!r}")
    elif not lines[0].isprintable():
        faults.append(f"says what no terminal should show: {error[:300]!r}")
    elif len(error) > 2000:
        faults.append(f"says {len(error)} characters: {error[:300]!r}")
    if written := sorted(_files(folder) ^ before):
        faults.append(f"leaves {[name for name, *_ in written[:5]]}")
    return faults


def outcome(command: str, root: Path, temporary: Path) -> tuple[object, str]:
    """Returns the exit status of a command, or the exception that it ended with, and its errors."""
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(tempfile, "tempdir", str(temporary))
        patch.setattr(run_learn, "learn_coefficients", _accept)
        try:
            with (
                _at_most(LONGEST, LONGEST_WAIT),
                redirect_stdout(io.StringIO()),
                redirect_stderr(errors),
            ):
                cli.main(shlex.split(command))
            status: object = 0
        except SystemExit as stopped:
            status = stopped.code
        except BaseException as error:
            status = ": ".join(filter(None, [type(error).__name__, str(error)[:200]]))
    return status, errors.getvalue()


def _accept(*arguments: object, **options: object) -> None:
    raise Accepted


@contextmanager
def _at_most(seconds: float, waiting: float) -> Iterator[None]:
    """Ends the block with `Hang` when it takes longer, computing or waiting."""

    def hang(number: int, frame: FrameType | None) -> None:
        raise Hang

    timers = {signal.ITIMER_PROF: seconds, signal.ITIMER_REAL: waiting}
    signals = (signal.SIGPROF, signal.SIGALRM)
    before = [signal.signal(number, hang) for number in signals]
    for timer, limit in timers.items():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _files(folder: Path) -> set[tuple[str, int, int]]:
    """Returns the files and folders below a folder, with their sizes and times."""
    found = set()
    for path, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            file = os.path.join(path, name)
            state = os.lstat(file)
            is_folder = name in folders
            found.add(
                (
                    os.path.relpath(file, folder),
                    0 if is_folder else state.st_size,
                    0 if is_folder else state.st_mtime_ns,
                )
            )
    return found
