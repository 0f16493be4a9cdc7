"""The single coefficient that learning starts from, chosen without labels."""

from collections.abc import Callable

from adamerge_jax.walk import lowest_nearby

CANDIDATES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""The coefficients of all experts and parameters that are tried."""

FIRST = 0.3
"""The candidate that is tried first; the next ones are its neighbours."""


def best_single_coefficient(objective: Callable[[float], float]) -> float:
    """Returns the candidate with the lowest objective, by walking downhill from `FIRST`.

    Task vectors of LoRA experts want a small coefficient, those of experts that were fine-tuned for
    a few steps a larger one: how large, the objective tells.

    Args:
        objective: The objective of a merge with one coefficient. It is called for the candidates
            on the way alone, three or four as a rule.

    Examples:
        >>> best_single_coefficient(lambda coefficient: (coefficient - 0.58) ** 2)
        0.6
    """
    return lowest_nearby(objective, CANDIDATES, FIRST)[0]
