"""The call that a run began with: when it was, and the command line where there is one."""

from contextvars import ContextVar
from datetime import UTC, datetime

COMMAND: ContextVar[str | None] = ContextVar("COMMAND", default=None)
"""The command line that runs, for the record; None where a program called."""


def describe_start() -> dict[str, str]:
    """Returns the time, in UTC, and the command line where there is one."""
    command = COMMAND.get()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return {"started": started} | ({} if command is None else {"command": command})
