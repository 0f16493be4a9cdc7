"""Memory of large arrays that the C library keeps for the next ones."""

import ctypes
import os
import sys
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Parameters of `mallopt`, as glibc's malloc.h numbers them."""

_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed, for which a step on a processor would else get new pages.

    All threads then take memory from one place: those beside the first one get large arrays from
    the system whatever else is set. It is to be called before there are any. Where the user has set
    a variable of glibc's allocator, or with another C library, all is left alone.
    """
    is_set = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if sys.platform != "linux" or is_set:
        return
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _LARGEST)
