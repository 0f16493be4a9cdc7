"""Signals stop at once or between steps, and none is lost."""

import os
import signal
import subprocess
import sys

import pytest

from adamerge_jax.stopping import (
    Stopped,
    between_steps,
    require_going_on,
    stop_asked,
    stop_on_signals,
)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_at_once(number, status):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as caught, stop_on_signals():
        send(number)
    assert caught.value.exit_status == status
    assert signal.getsignal(number) is before


def test_between_steps_it_is_looked_at(caplog):
    steps = 0
    with pytest.raises(Stopped), stop_on_signals(), between_steps():
        send(signal.SIGTERM)
        steps += 1
        assert stop_asked()
    assert steps == 1
    assert not stop_asked()


def test_one_that_is_swallowed_is_not_lost():
    reached = False
    with pytest.raises(Stopped) as caught, stop_on_signals():
        try:
            send(signal.SIGINT)
        except BaseException:
            reached = True
        require_going_on()
    assert reached and caught.value.signal == signal.SIGINT


def test_one_that_is_ignored_stays_ignored():
    """As of a job that a shell has put into the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals():
            send(signal.SIGINT)
            assert not stop_asked()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_one_ends_the_process():
    code = """
import os, signal
from adamerge_jax.stopping import between_steps, stop_on_signals
with stop_on_signals(), between_steps():
    os.kill(os.getpid(), signal.SIGTERM)
    print("first", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("second", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == "first\n"
