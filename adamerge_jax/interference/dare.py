"""DARE (Yu et al., ICML 2024): drop entries at random and rescale the others."""

from zlib import crc32

import numpy as np

from adamerge_jax.interference.step import Step


def drop_and_rescale(drop: float = 0.9, seed: int = 0) -> Step:
    """Sets a random part of each task vector to 0 and divides the rest by the part that stays.

    DARE (Yu et al., ICML 2024).

    Args:
        drop: Probability with which an entry is dropped, from 0 and under 1.
        seed: Seed of the draw, which depends on it, the tensor's name and the expert's position
            alone.

    Raises:
        ValueError: An argument is outside of its range.

    Examples:
        >>> import numpy as np
        >>> from adamerge_jax.interference import drop_and_rescale
        >>> values = drop_and_rescale(drop=0.5).apply("weight", np.ones((2, 100)), None)  # [K, n]
        >>> sorted(set(values.ravel().tolist()))
        [0.0, 2.0]
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop is {drop}, expected from 0 and under 1")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed is {seed}, expected a whole number, at least 0")

    def apply(name: str, values: np.ndarray, fitted: None) -> np.ndarray:
        generator = np.random.default_rng([seed, crc32(name.encode())])
        stays = generator.random(values.shape, dtype=np.float32) >= drop
        rescaled = values.astype(np.float32) / np.float32(1 - drop)
        return np.where(stays, rescaled, 0).astype(values.dtype)

    return Step(apply)
