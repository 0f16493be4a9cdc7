"""The first of several processes writes and prints; all others compute along."""

import logging
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console

from adamerge_jax.devices import is_first_process


def by_first_process(context: AbstractContextManager[None]) -> AbstractContextManager[None]:
    """Returns the context in the first process, and one that does nothing in all others."""
    return context if is_first_process() else nullcontext()


def silence_others(console: Console) -> Console:
    """Returns the console in the first process, and one that prints nothing in all others."""
    if is_first_process():
        return console
    logging.getLogger("adamerge_jax").setLevel(logging.ERROR)
    return Console(quiet=True)
