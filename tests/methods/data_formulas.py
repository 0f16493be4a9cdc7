"""The formulas of merge methods from calibration data, in NumPy and PyTorch in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.methods.tiny_network import (
    BIAS,
    DOWN,
    LAYERS,
    NORM,
    NORM_BIAS,
    OUT,
    SHAPES,
    UP,
    WIDTH,
    Problem,
    gram,
    layer_inputs,
    normalise,
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
        scaled = normalise(hidden) * parameters[NORM][number] + parameters[NORM_BIAS][number]
        inner = torch.tanh(scaled @ parameters[UP][number].T + parameters[BIAS][number])
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


def featcal_of(
    problem: Problem, coefficient: float, ridge: float, anchor: float, interpolation: float
) -> dict[str, np.ndarray]:
    """Gu et al., section 4 and appendix G: each normal equation solved as one of all unknowns."""
    base, experts = problem.base, problem.experts
    start = {n: base[n] + coefficient * sum(e[n] - base[n] for e in experts) for n in SHAPES}
    pull = {name: anchor * start[name] + (1 - anchor) * base[name] for name in SHAPES}
    merged = {name: array.copy() for name, array in start.items()}
    for number in [*range(LAYERS), None]:
        own, others = [], []
        for expert, data in zip(experts, problem.data, strict=True):
            own.append(layer_inputs(lambda n: merged, merged, data)[0])
            others.append(layer_inputs(lambda n, expert=expert: expert, expert, data)[0])
        fitted_layer = {}
        for name in (UP, DOWN) if number is not None else (OUT,):
            rows = [x[name, number].reshape(-1, x[name, number].shape[-1]) for x in own]
            targets = [x[name, number].reshape(-1, x[name, number].shape[-1]) for x in others]
            matrix, product = ridge * np.eye(rows[0].shape[1]), ridge * tensor(pull, name, number)
            for expert, x, y in zip(experts, rows, targets, strict=True):
                between = interpolation * y + (1 - interpolation) * x
                scale = 1 / np.linalg.norm(x.T @ x / len(x))
                matrix = matrix + scale * x.T @ x / len(x)
                product = product + scale * tensor(expert, name, number) @ between.T @ x / len(x)
            fit = fitted_layer[name] = np.linalg.solve(matrix, product.T).T
            if name == UP:
                total, share = ridge * tensor(pull, BIAS, number), ridge
                for expert, x, y in zip(experts, rows, targets, strict=True):
                    between = interpolation * y + (1 - interpolation) * x
                    scale = 1 / np.linalg.norm(x.T @ x / len(x))
                    output = between @ tensor(expert, UP, number).T + tensor(expert, BIAS, number)
                    total = total + scale * (output - x @ fit.T).mean(0)
                    share += scale
                fitted_layer[BIAS] = total / share
        if number is not None:
            weight, bias = np.zeros(WIDTH), np.zeros(WIDTH)
            for feature in range(WIDTH):
                matrix = ridge * np.eye(2)
                product = ridge * np.array([pull[n][number, feature] for n in (NORM, NORM_BIAS)])
                for expert, x in zip(experts, own, strict=True):
                    z = x[NORM, number].reshape(-1, WIDTH)[:, feature]
                    rows = np.stack([z, np.ones_like(z)], axis=1)
                    pair = [expert[n][number, feature] for n in (NORM, NORM_BIAS)]
                    matrix = matrix + rows.T @ rows / len(z)
                    product = product + rows.T @ (rows @ pair) / len(z)
                weight[feature], bias[feature] = np.linalg.solve(matrix, product)
            fitted_layer |= {NORM: weight, NORM_BIAS: bias}
        for name, fit in fitted_layer.items():
            tensor(merged, name, number)[...] = fit
    return merged


FEATCAL = {"coefficient": 0.4, "ridge": 0.2, "anchor": 1.5, "interpolation": 0.25}

DATA_CASES: list[tuple[str, dict[str, Any], Callable]] = [
    ("regmean", {"off_diagonal": 0.9}, regmean_of),
    ("regmean", {"off_diagonal": 0.3}, regmean_of),
    ("featcal", FEATCAL, featcal_of),
    ("fisher", {}, fisher_of),
    ("metrics_weighted", {"penalty": 2.0}, metrics_weighted_of),
    ("regmean_plus_plus", {"off_diagonal": 0.9}, regmean_plus_plus_of),
]
