"""Stopping on a signal: at once, or at the end of the step that is being taken.

A signal is remembered, so that none is lost where the exception that it raises is swallowed. While
`between_steps` holds, it is only remembered, and the loop asks `stop_asked` after each step. A
second signal ends the process at once, as the system does it; files are whole all the same.
"""

import itertools
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The end of a command by a signal.

    Attributes:
        signal: The signal.
    """

    def __init__(self, number: int = signal.SIGINT):
        super().__init__(signal.strsignal(number))
        self.signal = signal.Signals(number)

    @property
    def exit_status(self) -> int:
        """The status that shells give to a command that the signal has ended."""
        return 128 + self.signal


class _Wish:
    """The state of this process: the signal that has come, if any, and when to follow it."""

    signal: int | None = None
    deferred: bool = False
    handled: bool = False
    steps = itertools.count()


_WISH = _Wish()


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Makes SIGINT and SIGTERM stop the block, by raising `Stopped`.

    A signal that this process was told to ignore stays ignored. Outside of the main thread, which
    gets all signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    _WISH.signal, _WISH.deferred, _WISH.handled = None, False, True
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            # None is a handler that was not installed from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _WISH.signal, _WISH.handled = None, False


@contextmanager
def between_steps() -> Iterator[None]:
    """Defers stopping to where the block asks `stop_asked`, or to its end."""
    require_going_on()
    _WISH.deferred = True
    try:
        yield
    finally:
        _WISH.deferred = False
    require_going_on()


def stop_asked() -> bool:
    """Returns True if a signal has asked to stop.

    Of several processes all must call this, after each step: they get the same answer, and stop
    after the same step.
    """
    if _WISH.handled and _are_several():
        from jax.experimental import multihost_utils

        # Steps of all stages are counted on.
        return multihost_utils.reached_preemption_sync_point(next(_WISH.steps))
    return _WISH.signal is not None


def require_going_on() -> None:
    """Raises `Stopped` where a signal has come and its exception was swallowed or deferred."""
    if _WISH.signal is not None:
        raise stopped()


def stopped() -> Stopped:
    """Returns the exception of the signal that has come.

    To one of several processes perhaps none has: another one was told.
    """
    return Stopped(signal.SIGTERM if _WISH.signal is None else _WISH.signal)


def _on_signal(number: int, frame: FrameType | None) -> None:
    _WISH.signal = number
    signal.signal(number, signal.SIG_DFL)
    if not _WISH.deferred:
        raise stopped()
    if number == signal.SIGINT and _are_several():
        # JAX listens to SIGTERM, and tells the other processes.
        os.kill(os.getpid(), signal.SIGTERM)
    # In a thread: this one may be in the middle of a line of its own.
    log = logging.getLogger(__name__)
    message = "stopping after this step; a second signal ends the run at once"
    threading.Thread(target=log.warning, args=(message,)).start()


def _are_several() -> bool:
    """Returns True in one of several processes; small commands do without JAX."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.process_count() > 1
