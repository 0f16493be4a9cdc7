"""Methods that merge a tensor at a time see the entries of any representation, layer by layer."""

import jax.numpy as jnp
import numpy as np
import pytest

from adamerge_jax.methods import merged_parameters
from adamerge_jax.methods.by_tensor import Tensor, by_tensor
from adamerge_jax.task_vectors import DenseDelta, LowRankDelta
from adamerge_jax.task_vectors.offload.memory import HostMemory

LAYERS, EXPERTS, HEIGHT, WIDTH, RANK = 2, 3, 4, 6, 2


def factors(generator: np.random.Generator, *leading: int) -> tuple[np.ndarray, np.ndarray]:
    left = generator.normal(size=(*leading, EXPERTS, HEIGHT, RANK))
    return left, generator.normal(size=(*leading, EXPERTS, RANK, WIDTH))


@pytest.mark.parametrize("representation", ["dense", "low-rank", "in host memory"])
def test_a_method_sees_one_layer_of_all_experts(representation):
    generator = np.random.default_rng(0)
    left, right = factors(generator, LAYERS)
    deltas = left @ right
    base = generator.normal(size=(LAYERS, HEIGHT, WIDTH))
    delta = DenseDelta(jnp.asarray(deltas, jnp.float32))
    if representation == "low-rank":
        delta = LowRankDelta(jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32))
    elif representation == "in host memory":
        delta = HostMemory().keep("layer.*.weight", DenseDelta(np.float32(deltas)))
    names = []

    def median(tensor: Tensor) -> jnp.ndarray:
        names.append(tensor.name)
        np.testing.assert_allclose(tensor.base, base[len(names) - 1], atol=1e-6)
        return jnp.median(tensor.deltas, axis=0)

    merged = merged_parameters(
        by_tensor(median),
        {"layer.*.weight": jnp.asarray(base, jnp.float32), "other": jnp.ones(2)},
        {"layer.*.weight": delta},
        EXPERTS,
    )
    expected = base + np.median(deltas, axis=1)
    np.testing.assert_allclose(merged["layer.*.weight"], expected, atol=1e-5)
    assert names == ["layer.0.weight", "layer.1.weight"]
    assert merged["other"].tolist() == [1.0, 1.0]


def test_the_merge_has_the_dtype_of_the_base():
    deltas = {"bias": DenseDelta(jnp.ones((EXPERTS, WIDTH)))}
    base = {"bias": jnp.zeros(WIDTH, jnp.bfloat16)}
    merged = merged_parameters(by_tensor(lambda t: t.deltas.mean(0)), base, deltas, EXPERTS)
    assert merged["bias"].dtype == jnp.bfloat16
