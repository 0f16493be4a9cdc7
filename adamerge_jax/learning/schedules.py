"""Learning-rate schedules by the options of a recipe, where those of optax differ."""

import optax


def cosine_warm_restarts(
    init_value: float,
    decay_steps: int,
    first_steps: int = 50,
    factor: int = 2,
    end_ratio: float = 0.1,
) -> optax.Schedule:
    """Cosine decay that starts again, each time for longer (SGDR, Loshchilov & Hutter, ICLR 2017).

    Args:
        init_value: The learning rate at each start.
        decay_steps: The number of steps that the periods must cover.
        first_steps: Steps until the first restart.
        factor: The length of each period in lengths of the one before, 1 or more.
        end_ratio: The learning rate at the end of a period, as a part of `init_value`.
    """
    if first_steps < 1 or factor < 1:
        raise ValueError("first_steps and factor must be at least 1")
    periods = [first_steps]
    while sum(periods) < decay_steps:
        periods.append(periods[-1] * factor)
    rates = {"init_value": init_value, "peak_value": init_value, "warmup_steps": 0}
    rates |= {"end_value": end_ratio * init_value}
    return optax.sgdr_schedule([rates | {"decay_steps": steps} for steps in periods])


def harmonic(init_value: float) -> optax.Schedule:
    """Frank and Wolfe's steps: `init_value * 2 / (t + 2)` in step t, counted from 0.

    Args:
        init_value: The first step; 1 is the whole way.
    """
    return lambda count: init_value * 2 / (count + 2)
