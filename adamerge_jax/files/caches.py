"""The user's cache folder."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Returns a folder for things that can be made again; it need not be there.

    It is under `adamerge_jax` in `XDG_CACHE_HOME`, or in `~/.cache`.
    """
    # The standard says that a relative path there is to be ignored.
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        cache = Path.home() / ".cache"
    return cache / "adamerge_jax" / name
