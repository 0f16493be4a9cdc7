"""One process writes to a run folder; a second one is told which."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from adamerge_jax.errors import InputError
from adamerge_jax.runs.lock import hold

HOLDER = """
import sys, time
from pathlib import Path
from adamerge_jax.runs.lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds `run`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_told_who_holds_it(holder, tmp_path):
    with pytest.raises(InputError) as caught, hold(tmp_path / "run"):
        pass
    wanted = (
        rf"{tmp_path / 'run'} is in use by process {holder.pid} on {socket.gethostname()} since "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d; wait until it has ended, end it, or choose another folder"
    )
    assert re.fullmatch(wanted, str(caught.value))
    # A killed process holds nothing, whatever it has left.
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / ".lock").is_file()
    again = pytest.raises(InputError, match=f"process {os.getpid()} on")
    with hold(tmp_path / "run"), again, hold(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path / "run") == []


def test_nothing_is_left_of_a_folder_without_files(tmp_path):
    with hold(tmp_path / "runs" / "one"):
        pass
    assert os.listdir(tmp_path) == []
    with hold(tmp_path / "runs" / "one"):
        (tmp_path / "runs" / "one" / "recipe.yaml").touch()
    assert os.listdir(tmp_path / "runs" / "one") == ["recipe.yaml"]


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    with hold(tmp_path / "run"):
        assert "run has no locks (No locks available): start nothing else" in caplog.text


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"), hold(tmp_path / "file" / "run"):
        pass
