"""Each kind of model in the guide merges, saves, folds and reports, in the lines that it prints."""

import dataclasses
import functools
import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adamerge_jax as am
from adamerge_jax.recipes.presets import PRESETS

PAGE = (Path(__file__).parents[2] / "docs/guides/own_model.md").read_text()
KINDS = ("Plain JAX", "Flax Linen", "Flax NNX", "Equinox")


def example(kind: str) -> str:
    section = PAGE.partition(f"### {kind}\n")[2].partition("\n### ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["layers", "activation", "depth"],
    meta_fields=[],
)
@dataclasses.dataclass
class MLP:
    """A stand-in for Equinox's, whose function and number are leaves too."""

    layers: list[dict[str, jax.Array]]
    activation: Any
    depth: int

    def __call__(self, x: jax.Array) -> jax.Array:
        *hidden, last = self.layers
        for layer in hidden:
            x = self.activation(layer["weight"] @ x + layer["bias"])
        return last["weight"] @ x + last["bias"]


def make_mlp(inputs: int, outputs: int, *, width_size: int, depth: int, key: jax.Array) -> MLP:
    sizes = [inputs, *[width_size] * depth, outputs]
    layers = [
        {"weight": jax.random.normal(key, (n, m)) / m**0.5, "bias": jnp.zeros(n)}
        for m, n in itertools.pairwise(sizes)
    ]
    return MLP(layers, jax.nn.relu, depth)


def equinox() -> Any:
    try:
        import equinox
    except ModuleNotFoundError:
        return SimpleNamespace(nn=SimpleNamespace(MLP=make_mlp))
    return equinox


def moved(leaf: Any, seed: int) -> Any:
    if not isinstance(leaf, jax.Array) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return leaf + 0.3 * np.random.default_rng(seed).normal(size=leaf.shape).astype(np.float32)


def arrays(model: Any) -> list[np.ndarray]:
    tree = nnx.state(model) if isinstance(model, nnx.Module) else model
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_this_kind(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS["recommended"]["learning"], "steps", 20)  # in a tenth of the time
    images = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
    data = {"plain": images, "mirrored": images[:, ::-1]}

    def fine_tune(model: Any, task: str) -> Any:
        seed = list(data).index(task)
        if isinstance(model, nnx.Module):
            graph, state = nnx.split(model)
            return nnx.merge(graph, jax.tree.map(lambda leaf: moved(leaf, seed), state))
        return jax.tree.map(lambda leaf: moved(leaf, seed), model)

    names = {
        **{"am": am, "jax": jax, "nn": nn, "nnx": nnx, "eqx": equinox(), "data": data},
        "fine_tune": fine_tune,
        "rngs": nnx.Rngs(0),
        "random": lambda shape: jax.random.normal(jax.random.key(0), shape) / shape[0] ** 0.5,
    }
    code = example(kind)
    assert len([line for line in code.splitlines() if line]) <= 12
    exec(code, names)
    merged, again, base = names["merged"], names["again"], names["base"]
    assert type(merged.parameters) is type(again) is type(base)
    for one, other in zip(arrays(merged.parameters), arrays(again), strict=True):
        assert (one == other).all()
    assert any((a != b).any() for a, b in zip(arrays(again), arrays(base), strict=True))
    assert merged.coefficients.granularity == ("row" if kind == "Equinox" else "column")
    assert "mirrored" in names["page"].read_text()
