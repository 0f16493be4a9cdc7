"""Conversations written in a tokenizer's chat template.

A template is a program that comes with a checkpoint: it may loop without end or fill the memory,
and a thread cannot be stopped. So templates run in a process of their own, which is limited in time
and memory. It is started with the first conversation and ends when it has had nothing to do for a
while, or with this process.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 5
"""The longest time in which the texts of one example are to be written."""

Messages = Sequence[Mapping[str, Any]]


class Chat(NamedTuple):
    """A conversation to be written.

    Attributes:
        messages: Its messages, each with a role and content.
        asked: True to write what asks the assistant for its answer behind them.
    """

    messages: Messages
    asked: bool = False


def write_chats(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat]) -> list[str]:
    """Writes conversations in the chat template of a tokenizer.

    Args:
        tokenizer: The tokenizer.
        chats: The conversations; the limit of time is for all together.

    Raises:
        ValueError: There is no template, it refuses a conversation, or it takes too much time or
            memory.
    """
    request = {
        "seconds": SECONDS,
        "template": tokenizer.get_chat_template(),
        "tokens": tokenizer.special_tokens_map,
        "chats": chats,
    }
    reply = _PROCESS.ask(json.dumps(request, default=str))
    if "error" in reply:
        raise ValueError(reply["error"])
    return reply["texts"]


class _TemplateProcess:
    """The process that runs chat templates, started when it is needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: str) -> dict[str, Any]:
        """Returns the answer to a request.

        Raises:
            ValueError: The process ended itself.
        """
        with self._lock:
            started = time.monotonic()
            reply = self._exchange(request)
            if not reply and time.monotonic() - started < SECONDS:
                # It had been ending for want of requests.
                reply = self._exchange(request)
        if not reply:
            raise ValueError(f"it takes longer than {SECONDS} s or too much memory")
        return json.loads(reply)

    def close(self) -> None:
        """Ends the process, if it is running."""
        if self._process is not None:
            self._process.kill()
            with self._process:  # closes its pipes and waits for it
                self._process = None

    def _exchange(self, request: str) -> str:
        """Sends a line and returns the one that answers it; empty if the process has ended."""
        if self._process is None or self._process.poll() is not None:
            self._process = _start()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        except OSError:  # its end of the pipe is closed
            reply = ""
        except BaseException:  # Ctrl-C: the answer would be taken for that to the next request
            process.kill()
            process.wait()
            raise
        if not reply.endswith("\n"):
            process.kill()
            process.wait()
            return ""
        return reply


def _start() -> subprocess.Popen[str]:
    script = Path(__file__).with_name("chat_process.py")
    return subprocess.Popen(
        # Isolated: neither the current directory nor the environment adds modules.
        [sys.executable, "-I", str(script), json.dumps([str(folder) for folder in sys.path])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # libraries reserve memory for each thread
    )


_PROCESS = _TemplateProcess()
atexit.register(_PROCESS.close)
