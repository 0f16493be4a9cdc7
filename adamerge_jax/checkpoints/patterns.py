"""Regular expressions of a stranger, matched in a process of their own.

An expression may take longer than anybody waits, to be compiled as well as to be matched, and
Python's `re` cannot be stopped. A process can. Other libraries that have a time limit do not look
at it while they compile, and read some expressions differently.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from adamerge_jax.errors import InputError

_SECONDS = 5.0
"""The time for all expressions of a file; ordinary ones take a few hundredths of a second."""

_SCRIPT = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
expressions, names = json.load(sys.stdin)
for expression in expressions:
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError, MemoryError) as error:
        json.dump({"expression": expression, "error": str(error)}, sys.stdout)
        break
else:
    first = (
        next((i for i, expression in enumerate(expressions) if re.match(expression, name)), None)
        for name in names
    )
    json.dump(list(first), sys.stdout)
"""


def first_matches(expressions: Sequence[str], names: Sequence[str], where: str) -> list[int | None]:
    """Returns the position of the first expression that matches each name from its beginning.

    Args:
        expressions: Regular expressions of Python's `re`.
        names: The names to match.
        where: The file and the field of the expressions, for messages.

    Returns:
        A position for each name, None for names that no expression matches.

    Raises:
        InputError: An expression is invalid, or they take too long.
    """
    if not expressions or not names:
        return [None] * len(names)
    # Isolated, and without site-packages: a process that starts within 20 ms and imports nothing
    # of anybody.
    command = [sys.executable, "-I", "-S", "-c", _SCRIPT]
    text = json.dumps([list(expressions), list(names)])
    try:
        finished = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"{where} has regular expressions that are not done within {_SECONDS:g} s; write the "
            "names of modules"
        ) from error
    if finished.returncode:
        raise InputError(
            f"{where} has regular expressions that cannot be matched "
            f"({finished.stderr.strip()[-100:]!r}); write the names of modules"
        )
    answer: list[int | None] | Mapping[str, Any] = json.loads(finished.stdout)
    if isinstance(answer, dict):
        raise InputError(
            f"{where} has {answer['expression'][:60]!r}, which is no regular expression "
            f"({answer['error'][:80]!r}); "
            "write the names of modules"
        )
    return answer
