"""Functions of each value beside PyTorch's: `python experiments/benchmarks/functions.py`.

Processor time of one thread for the layer norm, GELU and softmax of attention in a layer of
all-MiniLM-L6-v2, on 96 texts of 32 tokens: alone, and with the gradient by their inputs and
parameters. Of several runs the fastest counts. PyTorch comes with the `test` extra.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from rich.table import Table

from adamerge_jax.cli.console import make_console
from adamerge_jax.models.layers import ACTIVATIONS, LayerNorm

TEXTS, TOKENS, HIDDEN, WIDE, HEADS = 96, 32, 384, 1536, 12
REPEATS, RUNS = 7, 8


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """The package's layer norm as a function of its parameters."""
    module = LayerNorm(HIDDEN, 1e-12)
    graph, _ = nnx.split(module)
    return nnx.merge(graph, nnx.State({"weight": nnx.Param(weight), "bias": nnx.Param(bias)}))(x)


def torch_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """PyTorch's."""
    return torch.nn.functional.layer_norm(x, (HIDDEN,), weight, bias, 1e-12)


CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "layer norm": (layer_norm, torch_layer_norm, ((TEXTS * TOKENS, HIDDEN), (HIDDEN,), (HIDDEN,))),
    "GELU": (ACTIVATIONS["gelu"], torch.nn.functional.gelu, ((TEXTS * TOKENS, WIDE),)),
    "softmax": (jax.nn.softmax, lambda x: x.softmax(-1), ((TEXTS * HEADS, TOKENS, TOKENS),)),
}
"""By name: our function, PyTorch's, and the shapes of their arguments."""


def fastest(run: Callable[[], object]) -> float:
    """Milliseconds of processor time of one call, in the fastest of several runs."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        for _ in range(RUNS):
            results = run()
        jax.block_until_ready(results)
        seconds.append(time.process_time() - start)
    return 1e3 * min(seconds) / RUNS


def measure(name: str) -> list[float]:
    """Our forward and both, then PyTorch's, in milliseconds."""
    ours, theirs, shapes = CASES[name]
    generator = np.random.default_rng(0)
    values = [generator.standard_normal(shape, np.float32) for shape in shapes]
    cotangent = generator.standard_normal(shapes[0], np.float32)
    arrays, slope = jax.device_put((values, cotangent))
    forward = jax.jit(ours)
    both = jax.jit(lambda arrays, slope: jax.vjp(ours, *arrays)[1](slope))
    tensors = [torch.from_numpy(value).requires_grad_() for value in values]
    torch_slope = torch.from_numpy(cotangent)

    def torch_forward() -> None:
        with torch.no_grad():
            theirs(*tensors)

    return [
        fastest(lambda: forward(*arrays)),
        fastest(lambda: both(arrays, slope)),
        fastest(torch_forward),
        fastest(lambda: torch.autograd.grad(theirs(*tensors), tensors, torch_slope) and None),
    ]


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    table = Table(title="processor milliseconds, one thread")
    for column in ("", "forward", "forward, backward", "PyTorch: forward", "forward, backward"):
        table.add_column(column, justify="right" if column else "left")
    for name in CASES:
        table.add_row(name, *(f"{milliseconds:.2f}" for milliseconds in measure(name)))
    make_console().print(table)


if __name__ == "__main__":
    main()
