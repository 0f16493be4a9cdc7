"""The cache of compiled programs, so that the second start of a recipe is quick."""

import os
from pathlib import Path


def keep_compiled_programs() -> None:
    """Makes JAX keep compiled programs in the user's cache folder, from one run to the next.

    The folder is `adamerge_jax/compiled` under `XDG_CACHE_HOME`, or under `~/.cache`. Where the
    user has set `JAX_COMPILATION_CACHE_DIR`, if only to nothing, that is left alone.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.values["jax_compilation_cache_dir"]:
        return
    # The standard says that a relative path there is to be ignored.
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        cache = Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(cache / "adamerge_jax" / "compiled"))
