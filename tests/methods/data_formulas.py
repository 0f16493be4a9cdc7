"""The formulas of merge methods from calibration data, in NumPy in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.methods.tiny_network import DOWN, LAYERS, OUT, UP, Problem, gram, layer_inputs

LINEAR = [*((name, number) for number in range(LAYERS) for name in (UP, DOWN)), (OUT, None)]


def tensor(parameters: dict[str, np.ndarray], name: str, number: int | None) -> np.ndarray:
    return parameters[name] if number is None else parameters[name][number]


def fitted(problem: Problem, inputs: list[Any], place: Any, off_diagonal: float) -> np.ndarray:
    """Jin et al., eq. 2: `W^T = (sum_k G_k)^-1 sum_k G_k W_k^T` with shrunk Gram matrices."""
    total, product = 0.0, 0.0
    for expert, expert_inputs in zip(problem.experts, inputs, strict=True):
        matrix = gram(expert_inputs[place])
        matrix = np.where(np.eye(len(matrix)) > 0, matrix, off_diagonal * matrix)
        total = total + matrix
        product = product + matrix @ tensor(expert, *place).T
    return np.linalg.solve(total, product).T


def regmean_of(problem: Problem, off_diagonal: float) -> dict[str, np.ndarray]:
    merged = {name: average.copy() for name, average in problem.average.items()}
    inputs = [
        layer_inputs(lambda number, expert=expert: expert, expert, data)[0]
        for expert, data in zip(problem.experts, problem.data, strict=True)
    ]
    for place in LINEAR:
        tensor(merged, *place)[...] = fitted(problem, inputs, place, off_diagonal)
    return merged


def regmean_plus_plus_of(problem: Problem, off_diagonal: float) -> dict[str, np.ndarray]:
    """Nguyen et al., section 3: merged layers before layer l, the expert's own layer l."""
    merged = {name: average.copy() for name, average in problem.average.items()}
    for number in [*range(LAYERS), None]:
        inputs = []
        for expert, data in zip(problem.experts, problem.data, strict=True):
            chosen = {number: expert}
            inputs.append(layer_inputs(lambda n, c=chosen: c.get(n, merged), merged, data)[0])
        for name in (UP, DOWN) if number is not None else (OUT,):
            fit = fitted(problem, inputs, (name, number), off_diagonal)
            tensor(merged, name, number)[...] = fit
    return merged


DATA_CASES: list[tuple[str, dict[str, Any], Callable]] = [
    ("regmean", {"off_diagonal": 0.9}, regmean_of),
    ("regmean", {"off_diagonal": 0.3}, regmean_of),
    ("regmean_plus_plus", {"off_diagonal": 0.9}, regmean_plus_plus_of),
]
