"""A network of stacked and single linear layers, in JAX with taps and in NumPy in float64."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamerge_jax.mixing import is_lazy
from adamerge_jax.statistics import CalibrationBatch, Statistics, TaskData
from adamerge_jax.task_vectors import DenseDelta

EXPERTS, LAYERS, WIDTH, INNER, CLASSES = 3, 2, 5, 4, 3

UP, BIAS, DOWN, OUT = "layers.*.up.weight", "layers.*.up.bias", "layers.*.down.weight", "out.weight"
NORM, NORM_BIAS = "layers.*.norm.weight", "layers.*.norm.bias"
SHAPES = {
    "scale": (WIDTH,),
    UP: (LAYERS, INNER, WIDTH),
    BIAS: (LAYERS, INNER),
    DOWN: (LAYERS, WIDTH, INNER),
    NORM: (LAYERS, WIDTH),
    NORM_BIAS: (LAYERS, WIDTH),
    OUT: (CLASSES, WIDTH),
}

Parameters = dict[str, np.ndarray]


def apply(weight: Any, x: Any) -> Any:
    """`x @ weight.T`, as a linear layer computes it."""
    flat = x.reshape(-1, x.shape[-1])
    y = weight.apply(flat) if is_lazy(weight) else flat @ weight.T
    return y.reshape(*x.shape[:-1], -1)


def value(parameter: Any) -> Any:
    """A parameter as an array."""
    return parameter.materialize() if is_lazy(parameter) else parameter


def normalise(x: Any) -> Any:
    """Rows of mean 0 and mean square 1."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / (centred**2).mean(-1, keepdims=True) ** 0.5


def run(parameters: Mapping[str, Any], inputs: Mapping[str, Any]) -> Any:
    """The logits `[B, C]` of inputs `[B, T, n]`."""
    stacked = {name: parameters[name] for name in SHAPES if "*" in name}

    def layer(hidden: Any, weights: Mapping[str, Any]) -> tuple[Any, None]:
        normalised, scale = normalise(hidden), weights[NORM]
        scaled = scale.times(normalised) if is_lazy(scale) else normalised * scale
        inner = jnp.tanh(
            apply(weights[UP], scaled + value(weights[NORM_BIAS])) + value(weights[BIAS])
        )
        return hidden + apply(weights[DOWN], inner), None

    hidden, _ = jax.lax.scan(layer, inputs["x"] * value(parameters["scale"]), stacked)
    return apply(parameters[OUT], hidden.mean(1))


def layer_inputs(of_layer: Callable[[int], Parameters], last: Parameters, x: np.ndarray) -> Any:
    """The inputs of linear layers and normalisations by name and layer, and the logits, float64.

    Args:
        of_layer: The parameters of the network that runs a layer.
        last: Those of the network that runs the rest.
        x: The network's inputs.
    """
    inputs, hidden = {}, x * last["scale"]
    for number in range(LAYERS):
        weights = of_layer(number)
        inputs[NORM, number] = normalise(hidden)
        scaled = inputs[NORM, number] * weights[NORM][number] + weights[NORM_BIAS][number]
        inputs[UP, number] = scaled
        inner = np.tanh(scaled @ weights[UP][number].T + weights[BIAS][number])
        inputs[DOWN, number] = inner
        hidden = hidden + inner @ weights[DOWN][number].T
    inputs[OUT, None] = hidden.mean(1)
    return inputs, inputs[OUT, None] @ last[OUT].T


def gram(x: np.ndarray) -> np.ndarray:
    rows = x.reshape(-1, x.shape[-1])
    return rows.T @ rows / len(rows)


class Problem:
    """A base, experts and data, drawn at random, in float64 and as methods get them."""

    def __init__(self, seed: int = 0):
        generator = np.random.default_rng(seed)
        self.base = {name: generator.normal(size=shape) for name, shape in SHAPES.items()}
        self.experts = [
            {
                name: base + 0.5 * generator.normal(size=base.shape)
                for name, base in self.base.items()
            }
            for _ in range(EXPERTS)
        ]
        mixing = generator.normal(size=(EXPERTS, WIDTH, WIDTH))
        self.data = [generator.normal(size=(11, 4, WIDTH)) @ mixing[k] for k in range(EXPERTS)]
        self.average = {
            name: np.mean([expert[name] for expert in self.experts], axis=0) for name in SHAPES
        }

    @property
    def deltas(self) -> dict[str, DenseDelta]:
        """The task vectors, `[K, *shape]`, `[L, K, *shape]` where stacked."""
        deltas = {}
        for name, base in self.base.items():
            entries = np.stack([expert[name] - base for expert in self.experts])
            stacked = entries.swapaxes(0, 1) if "*" in name else entries
            deltas[name] = DenseDelta(jnp.asarray(stacked, jnp.float32))
        return deltas

    @property
    def base_arrays(self) -> dict[str, Any]:
        return {name: jnp.asarray(base, jnp.float32) for name, base in self.base.items()}

    def statistics(self, on_batch: Any = lambda done: None) -> Statistics:
        """The calibration data in batches of four, of whose last three examples count."""

        def batches(data: np.ndarray) -> Iterator[CalibrationBatch]:
            for start in range(0, len(data), 4):
                rows = np.arange(start, start + 4)
                weights = (rows < len(data)).astype(np.float32)
                x = data[rows % len(data)].astype(np.float32)
                yield CalibrationBatch({"x": x}, weights)

        def task(data: np.ndarray) -> TaskData:
            return TaskData(lambda: batches(data), 3, lambda p, head, inputs: run(p, inputs), ())

        return Statistics(run, [task(data) for data in self.data], on_batch)
