"""Learning-rate schedules that optax does not have."""

import jax.numpy as jnp
import optax


def cosine_warm_restarts(
    init_value: float, first_steps: int = 50, factor: int = 2, end_ratio: float = 0.1
) -> optax.Schedule:
    """Cosine decay that starts again, each time for longer (SGDR, Loshchilov & Hutter, ICLR 2017).

    Args:
        init_value: The learning rate at each start.
        first_steps: Steps until the first restart.
        factor: How many times as long each period is as the one before, 1 or more.
        end_ratio: The learning rate at the end of a period, as a part of `init_value`.
    """
    if first_steps < 1 or factor < 1:
        raise ValueError("first_steps and factor must be at least 1")

    def schedule(step):
        if factor == 1:
            length, since = first_steps, step % first_steps
        else:
            # Period n begins at step first * (factor^n - 1) / (factor - 1).
            ratio = step * (factor - 1) / first_steps + 1
            period = jnp.floor(jnp.log(ratio) / jnp.log(factor) + 1e-6)
            length = first_steps * factor**period
            since = step - first_steps * (factor**period - 1) / (factor - 1)
        decayed = 0.5 * (1 + jnp.cos(jnp.pi * since / length))
        return init_value * (end_ratio + (1 - end_ratio) * decayed)

    return schedule
