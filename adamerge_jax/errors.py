"""The errors that a user may meet: unusable input, and learning that diverges."""

import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """An input that cannot be used.

    The message is one line that names the file, the tensor or the field, the value found and the
    value expected, and a remedy. The command line prints it without a traceback and exits with
    status 2.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax import InputError, task_vectors
        >>> try:
        ...     task_vectors({"kernel": jnp.ones((2, 3))}, [{"kernel": jnp.ones((2, 4))}])
        ... except InputError as error:
        ...     print(error)
        expert 0: parameter 'kernel' has shape (2, 4), the base has (2, 3)
    """


class NonFiniteObjectiveError(RuntimeError):
    """The objective stopped being a finite number.

    Attributes:
        learned: The last good coefficients, a `Learned`: the best on held-out data up to then.
    """

    def __init__(self, message: str, learned: Any):
        super().__init__(message)
        self.learned = learned


class _FileNote(str):
    """The note of an exception that names the file that was in hand."""

    file: str

    def __new__(cls, file: Path | str) -> "_FileNote":
        note = super().__new__(cls, f"file in hand: {file}")
        note.file = str(file)
        return note


@contextmanager
def in_hand(file: Path | str) -> Iterator[None]:
    """Notes on an exception that leaves the block which file or folder was read or written in it.

    For what no reader foresees: `file_in_hand` tells the command line what it can blame. Of nested
    blocks the innermost counts.
    """
    try:
        yield
    except Exception as error:
        error.add_note(_FileNote(file))
        raise


def file_in_hand(error: BaseException) -> str | None:
    """Returns the file or folder that was in hand when an exception was raised, if it is known."""
    # The system names the file itself, but by its number where only a descriptor was used.
    if isinstance(error, OSError) and isinstance(error.filename, str | bytes):
        return os.fsdecode(error.filename)
    notes = getattr(error, "__notes__", ())
    return next((note.file for note in notes if isinstance(note, _FileNote)), None)


def readable(message: str, longest: int = 1000) -> str:
    """Returns a message as one line that a terminal can show.

    Characters that would do something there are written as in Python, a line break as a backslash
    and an n. What a message quotes may have any length; of a long one the middle is left out,
    because the advice is at the end.
    """
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} ... {text[-half:]}"


def in_one_line(error: BaseException) -> str:
    """Returns another library's message as part of a one-line message.

    It may quote a stranger's file, whose control characters would reach the terminal.
    """
    text = textwrap.shorten(str(error), width=240, placeholder=" ...") or type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in text)


def shorten(text: str, width: int = 80) -> str:
    """Returns the beginning of a text that a stranger wrote, as part of a one-line message."""
    joined = " ".join(text.split())
    return joined if len(joined) <= width else f"{joined[: width - 3]}..."


def and_more(count: int) -> str:
    """Returns the end of a list of which a message names only the first item."""
    return f" (and {count} more)" if count else ""
