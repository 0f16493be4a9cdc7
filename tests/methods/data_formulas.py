"""The formulas of merge methods from calibration data, in NumPy and PyTorch in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.methods.tiny_network import (
    BIAS,
    DOWN,
    LAYERS,
    OUT,
    SHAPES,
    UP,
    Problem,
    gram,
    layer_inputs,
)

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


def torch_logits(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    hidden = x * parameters["scale"]
    for number in range(LAYERS):
        inner = torch.tanh(hidden @ parameters[UP][number].T + parameters[BIAS][number])
        hidden = hidden + inner @ parameters[DOWN][number].T
    return hidden.mean(0) @ parameters[OUT].T


def fisher_of(problem: Problem) -> dict[str, np.ndarray]:
    """Matena and Raffel, eqs. 3 and 4, by automatic differentiation in PyTorch."""
    total = {name: 0.0 for name in SHAPES}
    product = {name: 0.0 for name in SHAPES}
    for expert, data in zip(problem.experts, problem.data, strict=True):
        parameters = {n: torch.tensor(array, requires_grad=True) for n, array in expert.items()}
        for x in torch.tensor(data):
            values = torch.log_softmax(torch_logits(parameters, x), -1)
            for value in values:
                gradients = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
                for name, gradient in zip(parameters, gradients, strict=True):
                    square = (value.exp() * gradient**2 / len(data)).detach().numpy()
                    total[name] = total[name] + square
                    product[name] = product[name] + square * expert[name]
    return {name: product[name] / total[name] for name in SHAPES}


def metrics_weighted_of(problem: Problem, penalty: float) -> dict[str, np.ndarray]:
    """Weights from the mean entropy of each expert on the data of all tasks."""
    losses = []
    for expert in problem.experts:
        entropies = []
        for data in problem.data:
            logits = layer_inputs(lambda number, expert=expert: expert, expert, data)[1]
            shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            entropies.append(-(shares * np.log(shares)).sum(-1).mean())
        losses.append(np.mean(entropies))
    weights = np.array(losses) ** -penalty
    weights /= weights.sum()
    return {
        name: sum(
            weight * expert[name] for weight, expert in zip(weights, problem.experts, strict=True)
        )
        for name in SHAPES
    }


DATA_CASES: list[tuple[str, dict[str, Any], Callable]] = [
    ("regmean", {"off_diagonal": 0.9}, regmean_of),
    ("regmean", {"off_diagonal": 0.3}, regmean_of),
    ("fisher", {}, fisher_of),
    ("metrics_weighted", {"penalty": 2.0}, metrics_weighted_of),
    ("regmean_plus_plus", {"off_diagonal": 0.9}, regmean_plus_plus_of),
]
