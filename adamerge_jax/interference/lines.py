"""LiNeS (Wang et al., ICLR 2025): task vectors scaled by the depth of their layer."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from adamerge_jax.interference.step import Step
from adamerge_jax.parameter_names import place_in_stack, stack_depths, stack_of

_MOST_LAYERS = 10_000


def scale_by_depth(
    first: float | None = None, increase: float = 0.5, layers: int | None = None
) -> Step:
    """Multiplies the task vectors of layer l of L by `first + increase * l / (L - 1)`.

    LiNeS (Wang et al., ICLR 2025, section 4): shallow layers, which are general, change less than
    deep ones. Each stack of layers has its own L; parameters outside of stacks get `first`, as in
    the authors' code.

    Args:
        first: Factor of the first layer, the paper's alpha; by default 1 / K, the paper's for
            the sum of K task vectors.
        increase: The increase from the first layer to the last, the paper's beta.
        layers: The least number of layers of a stack; for experts that leave the last layers as
            they are, such as adapters of some layers. By default layers are counted up to the
            last one that an expert changes.

    Raises:
        ValueError: An argument is outside of its range.

    Examples:
        >>> import numpy as np
        >>> from adamerge_jax.interference import scale_by_depth
        >>> values = {f"layer.{l}.bias": np.ones((1, 2)) for l in range(3)}  # [K, *shape]
        >>> step = scale_by_depth(first=0.5, increase=1.0)
        >>> step.apply("layer.1.bias", values["layer.1.bias"], step.fit(values)).tolist()
        [[1.0, 1.0]]
    """
    for name, number in (("first", first or 0.0), ("increase", increase)):
        if not abs(number) <= 1e6:
            raise ValueError(f"{name} is {number}, expected from -1e6 to 1e6")
    if layers is not None and not (isinstance(layers, int) and 1 <= layers <= _MOST_LAYERS):
        raise ValueError(f"layers is {layers}, expected a whole number from 1 to {_MOST_LAYERS}")

    def fit(task_vectors: Mapping[str, np.ndarray]) -> dict[str, int]:
        return {stack: max(n, layers or 1) for stack, n in stack_depths(task_vectors).items()}

    def apply(name: str, values: np.ndarray, depths: dict[str, int]) -> np.ndarray:
        factor = 1 / len(values) if first is None else first
        if place := place_in_stack(name):
            stacked, layer = place
            # A stack that no expert changes has no depth, and nothing to scale.
            last = depths.get(stack_of(stacked), 1) - 1
            factor += increase * layer / max(last, 1)
        return (values * np.float32(factor)).astype(values.dtype)

    def takes(depths: Any, experts: int) -> bool:
        return isinstance(depths, dict) and all(
            isinstance(depth, int) and 1 <= depth <= _MOST_LAYERS for depth in depths.values()
        )

    return Step(apply, fit, takes)
