"""SCE of FuseChat (Wan et al., EMNLP 2025): select, calculate, erase."""

import numpy as np

from adamerge_jax.interference.step import Step


def select_variable(density: float = 0.1) -> Step:
    """Keeps the entries in which the experts differ most.

    The first step of SCE (Wan et al., EMNLP 2025, FuseChat, section 3.3): of the entries of a
    tensor whose variance over experts is over 0, a part of `density` with the largest stays; so do
    entries that vary as much as one of them. A single expert keeps all.

    Args:
        density: Part of the entries to keep, over 0 and up to 1, with which all stay.

    Raises:
        ValueError: The density is not over 0 and up to 1.

    Examples:
        >>> import numpy as np
        >>> from adamerge_jax.interference import select_variable
        >>> values = np.array([[4.0, 1.0], [-3.0, 2.0]])  # [K, *shape]
        >>> select_variable(density=0.5).apply("weight", values, None).tolist()
        [[4.0, 0.0], [-3.0, 0.0]]
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}, expected over 0 and up to 1")

    def apply(name: str, values: np.ndarray, fitted: None) -> np.ndarray:
        if density == 1 or len(values) == 1:
            return values
        mean = values.mean(0, dtype=np.float32)
        variance = sum(np.square(delta - mean) for delta in values)
        count = int(density * np.count_nonzero(variance))
        if not count:
            return np.zeros_like(values)
        limit = np.partition(variance.ravel(), -count)[-count]
        return np.where(variance >= limit, values, np.zeros((), values.dtype))

    return Step(apply)


def weigh_by_squares() -> Step:
    """Averages the entries that agree in sign, weighted by the squares of each expert's tensor.

    The last steps of SCE (Wan et al., EMNLP 2025, FuseChat, section 3.3). Calculate: the weight
    `w_k` of expert k is its share of the sum of squares of a tensor. Erase: entries are dropped
    whose sign is not that of the sum over experts. With `m_k` 1 for an entry that stays, else 0:

        tau_k  ->  w_k * m_k * tau_k / sum_j (w_j * m_j)

    so that the sum over experts is the merged task vector. The division is that of the authors'
    code in mergekit.

    Examples:
        >>> import numpy as np
        >>> from adamerge_jax.interference import weigh_by_squares
        >>> weigh_by_squares().apply("a", np.array([[3.0, -1.0], [1.0, 3.0]]), None).tolist()
        [[1.5, 0.0], [0.5, 3.0]]
    """

    def apply(name: str, values: np.ndarray, fitted: None) -> np.ndarray:
        squares = [float(np.square(delta, dtype=np.float64).sum()) for delta in values]
        if not sum(squares) > 0:
            return values
        weights = [np.float32(square / sum(squares)) for square in squares]
        elected = np.sign(values.sum(0, dtype=np.float32))
        total = sum(
            weight * (np.sign(delta) == elected)
            for weight, delta in zip(weights, values, strict=True)
        )
        divisor = np.where(total > 0, total, 1)
        weighted = np.empty_like(values)
        for expert, weight in enumerate(weights):
            agrees = np.sign(values[expert]) == elected
            weighted[expert] = np.where(agrees, values[expert] * (weight / divisor), 0)
        return weighted

    return Step(apply)
