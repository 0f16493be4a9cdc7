"""The cache of compiled programs, so that the second start of a recipe is quick."""

import os

from adamerge_jax.files.caches import cache_folder


def keep_compiled_programs() -> None:
    """Makes JAX keep compiled programs in the user's cache folder, from one run to the next.

    Where the user has set `JAX_COMPILATION_CACHE_DIR`, if only to nothing, that is left alone.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.values["jax_compilation_cache_dir"]:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder("compiled")))
