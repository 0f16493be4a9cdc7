"""The errors that a user may meet: unusable input, and learning that diverges."""

import textwrap
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


def in_one_line(error: BaseException) -> str:
    """Returns another library's message as part of a one-line message.

    It may quote a stranger's file, whose control characters would reach the terminal.
    """
    text = textwrap.shorten(str(error), width=240, placeholder=" ...") or type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in text)


def and_more(count: int) -> str:
    """Returns the end of a list of which a message names only the first item."""
    return f" (and {count} more)" if count else ""
