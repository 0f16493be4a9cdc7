"""Fewer searches for cyclic garbage, of which imports and traces leave little."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Puts the searches off: they walk through all objects, a fifth of the time of a plan."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def leave_garbage_at_exit() -> None:
    """Spares the end of the process its own search, which would take a second."""
    atexit.register(gc.freeze)
