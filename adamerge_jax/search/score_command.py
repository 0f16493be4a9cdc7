"""A score that a command prints: any program that evaluates a checkpoint, such as lm-eval."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from adamerge_jax.errors import InputError, shorten

PLACE = "{checkpoint}"
"""The place of the merged checkpoint's folder in a command."""

_NUMBER = re.compile(rb"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]*\w)")

_TAIL = 1 << 20
"""The number of bytes at the end of what a command prints in which its number is looked for."""


def split_command(command: str) -> list[str]:
    """Returns the words of a command.

    Args:
        command: The program and its arguments, quoted as in a shell, which does not see them.

    Raises:
        InputError: Quotes are not closed, it does not say where the checkpoint goes, or there is no
            such program.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"--score-command: {error}: {shorten(command)}") from error
    if not any(PLACE in word for word in words[1:]):
        raise InputError(
            f"--score-command: {shorten(command)!r} does not say where the checkpoint goes; put "
            f"{PLACE} in its place"
        )
    if shutil.which(words[0]) is None:
        raise InputError(
            f"--score-command: there is no program {shorten(words[0])!r}; install it, or give its "
            "path (no shell runs it: no pipes, variables and built-in commands)"
        )
    return words


def run_command(words: Sequence[str], checkpoint: Path, timeout: float) -> float:
    """Runs a command on a checkpoint, and returns the last number that it prints.

    Args:
        words: The program and its arguments, with `{checkpoint}` in at least one of them.
        checkpoint: The folder that takes its place.
        timeout: The number of seconds after which the command is ended.

    Raises:
        InputError: The command fails, takes too long, or prints no number.
    """
    filled = [words[0], *(word.replace(PLACE, str(checkpoint)) for word in words[1:])]
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as errors:
        try:
            # A session of its own, so that what it starts can be ended with it.
            process = subprocess.Popen(
                filled,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=errors,
                start_new_session=True,
            )
        except OSError as error:
            raise InputError(
                f"--score-command: {words[0]} cannot be run ({error.strerror or error})"
            ) from error
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise InputError(
                f"--score-command: {words[0]} has not ended after {timeout:g} seconds and was "
                f"stopped{_last_line(errors)}; give more with --score-timeout"
            ) from error
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if status:
            ended = f"exit status {status}" if status > 0 else f"signal {-status}"
            raise InputError(
                f"--score-command: {words[0]} ended with {ended}{_last_line(errors, printed)}"
            )
        numbers = _NUMBER.findall(_tail(printed))
        if not numbers:
            raise InputError(
                f"--score-command: {words[0]} printed no number on standard output"
                f"{_last_line(printed, errors)}; its last one is the score"
            )
        return float(numbers[-1])


def _tail(stream: IO[bytes]) -> bytes:
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - _TAIL))
    return stream.read()


def _last_line(*streams: IO[bytes]) -> str:
    """Returns the last line of the first stream that has one, as part of a message."""
    for stream in streams:
        lines = _tail(stream).decode(errors="replace").split("\n")
        text = next((line for line in reversed(lines) if line.strip()), "")
        if text:
            printable = "".join(c if c.isprintable() else "?" for c in shorten(text, 200))
            return f" (its last line: {printable!r})"
    return ""
