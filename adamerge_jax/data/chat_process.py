"""The process that writes conversations in chat templates; `chat_templates.py` starts it.

It reads a request a line and answers each with a line, both JSON. It ends itself if a request takes
too long, or if none comes for a while: the watchdog is a thread outside of Python, which a template
cannot keep from running.
"""

import contextlib
import faulthandler
import functools
import json
import os
import sys
from typing import Any

IDLE_SECONDS = 20
"""The time without a request after which the process ends."""

MEMORY_BYTES = 2 * 2**30
"""The address space of the process, on systems that can limit it."""

CHARACTERS = 2**16
"""The length of the longest text that a template may write for a short conversation."""

TIMES = 8
"""The number of times that a text may be longer than the request, if that is more."""


def serve(requests: Any, replies: Any) -> None:
    """Answers requests until there are no more.

    Args:
        requests: A text stream of lines `{"seconds", "template", "tokens", "chats"}`: the longest
            time for an answer, and the chats, each its messages and whether the template is to ask
            for a response.
        replies: A text stream for lines `{"texts"}` or `{"error"}`.
    """
    from transformers import PreTrainedTokenizerBase

    @functools.lru_cache(maxsize=4)
    def tokenizer_with(template: str) -> PreTrainedTokenizerBase:
        return PreTrainedTokenizerBase(chat_template=template)

    def write(
        longest: int, template: str, tokens: dict[str, Any], chats: list[tuple[Any, bool]]
    ) -> list[str]:
        texts = []
        for messages, asked in chats:
            text = tokenizer_with(template).apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asked, **tokens
            )
            if len(text) > longest:
                raise ValueError(f"it writes more than {longest} characters")
            texts.append(text)
        return texts

    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(IDLE_SECONDS, exit=True, file=nowhere)
        for line in requests:
            request = json.loads(line)
            seconds = request.pop("seconds")
            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
            try:
                reply: dict[str, Any] = {
                    "texts": write(max(CHARACTERS, TIMES * len(line)), **request)
                }
            except MemoryError:
                reply = {"error": "it needs too much memory"}
            # Jinja's own errors, those that a template raises, KeyError, TypeError, RecursionError
            except Exception as error:
                reply = {"error": " ".join(str(error).split())[:500] or type(error).__name__}
            replies.write(json.dumps(reply) + "\n")
            replies.flush()
            faulthandler.dump_traceback_later(IDLE_SECONDS, exit=True, file=nowhere)


if __name__ == "__main__":
    # The modules of the process that started this one, and nothing of the current directory.
    sys.path[:] = json.loads(sys.argv[1])
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on all systems
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # no library writes among the answers
    serve(sys.stdin, answers)
