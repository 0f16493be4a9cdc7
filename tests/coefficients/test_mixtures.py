"""One coefficient for each expert of a mixture, against NumPy in float64."""

import jax
import numpy as np
import pytest

from adamerge_jax.coefficients.file import unstack_values
from adamerge_jax.coefficients.granularities import constant, mixture_expert
from adamerge_jax.errors import InputError
from adamerge_jax.mixing import materialize, mix
from adamerge_jax.parameter_names import tensors_of, unstacked_shapes
from adamerge_jax.task_vectors import DenseDelta

K, L = 3, 3  # the two axes must not be taken for each other
APART = {
    "embed.weight": (7, 4),
    "layers.*.norm.weight": (L, 4),
    "layers.*.mlp.gate.weight": (L, 4, 4),
    "layers.*.mlp.shared_expert.up.weight": (L, 6, 4),
    **{f"layers.*.mlp.experts.{expert}.up.weight": (L, 6, 4) for expert in range(2)},
    **{f"layers.*.mlp.experts.{expert}.down.weight": (L, 4, 6) for expert in range(2)},
}
STACKED = {
    "embed.weight": (7, 4),
    "layers.*.norm.weight": (L, 4),
    "layers.*.mlp.gate.weight": (L, 4, 4),
    "layers.*.mlp.experts.gate_up_proj": (L, 2, 12, 4),
    "layers.*.mlp.experts.gate_up_proj_bias": (L, 2, 12),
    "layers.*.mlp.experts.correction": (L, 2),  # a vector has no coefficients of its own
}
# The first layer is dense, so that nothing is stacked.
UNEVEN = {
    f"layers.{layer}.mlp.{name}": (6, 4)
    for layer in range(2)
    for name in (["up.weight"] if layer == 0 else ["experts.0.up.weight", "experts.2.up.weight"])
}
# A layer has an expert that the others of its stack lack, so that its columns are others.
UNLIKE = {
    "layers.*.mlp.gate.weight": (L, 2, 4),
    "layers.*.mlp.experts.2.up.weight": (L, 6, 4),
    "layers.1.mlp.experts.0.up.weight": (6, 4),
}

CASES = {"apart": APART, "stacked": STACKED, "uneven": UNEVEN, "unlike": UNLIKE}


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def of_tensor(
    coefficients: dict[str, np.ndarray], name: str, delta: np.ndarray
) -> tuple[np.ndarray, str]:
    """Returns a part of one expert's change to a tensor, and its group, by the names alone."""
    before, dot, after = name.partition(".experts.")
    if not dot or after == "correction":
        layer = ".".join(name.split(".")[:2]) if name.startswith("layers") else "embed"
        return coefficients[layer] * delta, layer
    group = f"{before}.experts"
    of_experts = coefficients[group]
    if after[0].isdigit():
        column = 0 if after[0] == "0" else len(of_experts) - 1  # the numbers are 0, and 1 or 2
        return of_experts[column] * delta, group
    return np.stack([number * part for number, part in zip(of_experts, delta, strict=True)]), group


@pytest.mark.parametrize("shapes", CASES.values(), ids=CASES)
def test_merge(shapes: dict[str, tuple[int, ...]]) -> None:
    granularity = mixture_expert(shapes)
    start = granularity.init(constant(shapes, K, 0.3))
    assert all((values == np.float32(0.3)).all() for values in start.values())
    values = {group: draw(seed, *array.shape) for seed, (group, array) in enumerate(start.items())}
    base = {name: draw(10 + seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}
    deltas = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        stacked = (shape[0], K, *shape[1:]) if "*" in name else (K, *shape)
        deltas[name] = draw(50 + seed, *stacked)

    @jax.jit
    def merge(base, deltas, values):
        lazy = {name: DenseDelta(array) for name, array in deltas.items()}
        return materialize(mix(base, lazy, granularity.scales(values)))

    merged, by_group = merge(base, deltas, values), unstack_values(values)
    used: set[str] = set()
    for name, shape in shapes.items():
        tensors = tensors_of(name, shape)
        for layer, tensor in enumerate(tensors):
            place = layer if "*" in name else ...
            expected = base[name][place].astype(np.float64)
            for k, change in enumerate(deltas[name][place]):
                of_expert = {group: array[k] for group, array in by_group.items()}
                added, group = of_tensor(of_expert, tensor, change.astype(np.float64))
                expected = expected + added
                used.add(group)
            np.testing.assert_allclose(merged[name][place], expected, rtol=0, atol=1e-5)
    assert used == by_group.keys()
    # Tensors that are not stacked have the same scales.
    apart = mixture_expert(unstacked_shapes(shapes)).scales(values)
    for name, scale in granularity.scales(values).items():
        for layer, tensor in enumerate(tensors_of(name, shapes[name])):
            np.testing.assert_array_equal(apart[tensor], scale[layer] if "*" in name else scale)
    assert granularity.along_axes(shapes) and granularity.keeps_factors(shapes)


def test_the_mean_over_the_tensors_of_an_expert() -> None:
    start = {name: draw(seed, L if "*" in name else 1, K) for seed, name in enumerate(APART)}
    values = mixture_expert(APART).init(start)
    for layer in range(L):
        for expert in range(2):
            of_tensors = [
                start[f"layers.*.mlp.experts.{expert}.{kind}.weight"][layer]
                for kind in ("up", "down")
            ]
            of_expert = values[f"layers.{layer}.mlp.experts"][0, :, expert]
            np.testing.assert_allclose(of_expert, np.mean(of_tensors, axis=0), atol=1e-6)
    shared = [name for name in APART if ".experts." not in name and name.startswith("layers")]
    mean = np.mean([start[name][1] for name in shared], axis=0)
    np.testing.assert_allclose(values["layers.1"][0], mean, rtol=1e-6, atol=1e-7)


def test_the_compiled_function_is_short() -> None:
    """Two operations a parameter, however many layers it has, and one a mixture's stack."""
    layers, experts = 12, range(8)
    shapes = {f"layers.*.mlp.experts.{expert}.up.weight": (layers, 6, 4) for expert in experts}
    granularity = mixture_expert(shapes)
    values = granularity.init(constant(shapes, K, 0.3))
    assert len(jax.make_jaxpr(granularity.scales)(values).eqns) <= 2 * len(shapes) + 1


def test_a_model_without_mixtures() -> None:
    with pytest.raises(InputError, match="no merged parameter is an expert of a mixture"):
        mixture_expert({"layers.*.weight": (2, 3, 4)})
    assert not mixture_expert({}).prepares  # as recipes ask, which know no shapes
