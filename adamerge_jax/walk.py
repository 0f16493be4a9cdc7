"""The lowest of a few values, found by walking downhill, or from coarse to fine."""

import functools
import math
from collections.abc import Callable, Sequence


def lowest_nearby(
    function: Callable[[float], float], candidates: Sequence[float], first: float
) -> tuple[float, float]:
    """Returns the candidate with the lowest value that a walk downhill comes to, and the value.

    It calls the function for the candidates on the way alone, each once. A value that is not finite
    is never the lowest, unless that of the first candidate is not finite either.

    Args:
        function: A function of a candidate, with one valley as a rule.
        candidates: Candidates in their order.
        first: The candidate to begin with.

    Examples:
        >>> lowest_nearby(lambda x: (x - 2.2) ** 2, [0.0, 1.0, 2.0, 3.0], first=1.0)[0]
        2.0
    """
    values: dict[int, float] = {}

    def value(position: int) -> float:
        if position not in values:
            inside = 0 <= position < len(candidates)
            number = function(candidates[position]) if inside else math.inf
            values[position] = number if math.isfinite(number) else math.inf
        return values[position]

    position = candidates.index(first)
    for step in (1, -1):
        while value(position + step) < value(position):
            position += step
    return candidates[position], value(position)


def lowest_from_coarse(
    function: Callable[[float], float], candidates: Sequence[float], stride: int = 3
) -> float:
    """Returns the candidate with the lowest value, found from coarse to fine.

    It calls the function for every `stride`-th candidate, then for the neighbours of the lowest of
    them as long as they are lower. Each is called once.

    Args:
        function: A function of a candidate, with one valley as a rule.
        candidates: Candidates in their order.
        stride: The steps from one of the first candidates to the next.

    Examples:
        >>> lowest_from_coarse(lambda x: (x - 2.2) ** 2, [0.0, 1.0, 2.0, 3.0, 4.0])
        2.0
    """
    value = functools.cache(function)
    coarse = sorted({*candidates[::stride], candidates[-1]}, key=candidates.index)
    first = min(
        coarse, key=lambda candidate: (not math.isfinite(value(candidate)), value(candidate))
    )
    return lowest_nearby(value, candidates, first)[0]
