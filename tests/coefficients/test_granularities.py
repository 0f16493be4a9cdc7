"""Granularities under `jit` against NumPy in float64, one tensor after the other.

The reference cuts what an expert changed in a tensor into parts, one per coefficient, that sum to
the whole. The merged tensor is the base's and the parts, each times its coefficient; the gradient
of a coefficient is the inner product of its part with that of the merged tensor.
"""

import functools
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from transformers import BertConfig, CLIPConfig, T5Config, ViTConfig

from adamerge_jax.coefficients import granularities
from adamerge_jax.coefficients.file import unstack_values
from adamerge_jax.coefficients.granularities import (
    GRANULARITIES,
    Granularity,
    Shapes,
    constant,
    count_units,
    make_granularity,
    per_tensor,
)
from adamerge_jax.errors import InputError
from adamerge_jax.mixing import materialize, mix
from adamerge_jax.models import family_of
from adamerge_jax.parameter_names import is_stacked, layer_of, matches, unstack
from adamerge_jax.registry import allow_code
from adamerge_jax.task_vectors import DenseDelta, JoinedDelta, LoadedDelta, LowRankDelta
from tests.references import shapes_in_file

EXPERTS = 3
LAYERS = 3  # as many as experts: the two axes must not be taken for each other
SHAPES = {
    "logit_scale": (),
    "embeddings.word.weight": (7, 4),
    "embeddings.patch.weight": (6, 3, 2, 2),
    "norm.bias": (6,),
    "stem.kernel": (4, 3, 2, 2),
    "pooler.weight": (6, 4),
    "encoder.*.scale": (LAYERS,),
    "encoder.*.query.weight": (LAYERS, 4, 6),
    "encoder.*.query.bias": (LAYERS, 4),
    "encoder.*.output.weight": (LAYERS, 6, 4),
    "encoder.*.kernel": (LAYERS, 2, 3, 2, 2),
}
# What has one coefficient, but for the heads of a bias and for tables that may be split.
VECTORS = ("logit_scale", "*.scale", "*.bias")
WHOLE = (*VECTORS, "embeddings.*")

PATTERNS = {"first": ["encoder.0.*", "norm.*"], "kernels": ["*.kernel"]}
HEADS = {"*.query.*": (0, 2), "*.output.weight": (1, 2)}
UNEVEN = {
    "encoder.0.query.weight": 2,
    "encoder.1.*.weight": 4,
    "encoder.2.kernel": 6,
    "pooler.*": 5,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "task": ("task", {}),
    "layer": ("layer", {}),
    "tensor": ("tensor", {}),
    "groups": ("groups", {"patterns": PATTERNS}),
    "row": ("row", {}),
    "row and tables": ("row", {"tables": True}),
    "column": ("column", {}),
    "row_column": ("row_column", {}),
    "row_column and tables": ("row_column", {"tables": True}),
    "head": ("head", {"heads": HEADS}),
    "chunk": ("chunk", {"pieces": 5}),
    "chunk and tables": ("chunk", {"pieces": 5, "tables": True}),
    "uneven chunk": ("chunk", {"pieces": UNEVEN}),
    "partition": ("partition", {"groups": 5, "seed": 3}),
    "singular": ("singular", {"rank": 2}),
    "all singular": ("singular", {}),
    "entry": ("entry", {}),
}


def test_every_granularity_is_tested():
    # Mixtures have a module of their own, `test_mixtures`.
    assert {name for name, _ in CASES.values()} == set(GRANULARITIES) - {"mixture_expert"}


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def delta_shape(name: str) -> tuple[int, ...]:
    shape = SHAPES[name]
    return (shape[0], EXPERTS, *shape[1:]) if is_stacked(name) else (EXPERTS, *shape)


def unstacked(arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arrays by names without `*`."""
    tensors = {}
    for name, array in arrays.items():
        if is_stacked(name):
            tensors |= dict(zip(unstack(name, LAYERS), np.asarray(array), strict=True))
        else:
            tensors[name] = np.asarray(array)
    return tensors


BASE = {name: draw(seed, *shape) for seed, (name, shape) in enumerate(SHAPES.items())}
DELTAS = {name: draw(100 + seed, *delta_shape(name)) for seed, name in enumerate(SHAPES)}
COTANGENTS = {name: draw(200 + seed, *shape) for seed, (name, shape) in enumerate(SHAPES.items())}
TENSORS = unstacked(BASE)
TENSOR_SHAPES = {name: array.shape for name, array in TENSORS.items()}


def made(case: str, shapes: Shapes = SHAPES) -> Granularity:
    name, options = CASES[case]
    return make_granularity(name, options, shapes)


def prepared(granularity: Granularity, deltas: dict[str, np.ndarray] = DELTAS) -> dict[str, Any]:
    return {name: granularity.prepare(name, DenseDelta(d)) for name, d in deltas.items()}


def random_values(granularity: Granularity) -> dict[str, np.ndarray]:
    start = granularity.init(constant(SHAPES, EXPERTS, 0.0))
    return {
        group: draw(300 + seed, *array.shape) for seed, (group, array) in enumerate(start.items())
    }


def group_of(case: str, name: str) -> str:
    """The group of a tensor, by the table that a reader of `PATTERNS` would write."""
    if case == "task":
        return "all"
    if case == "layer":
        parts = name.split(".")
        return ".".join(parts[:2]) if parts[0] == "encoder" else parts[0]
    if case == "groups":
        if name.startswith("encoder.0.") or name == "norm.bias":
            return "first"
        return "kernels" if name.endswith(".kernel") else "others"
    return name


def only(delta: np.ndarray, place: Any) -> np.ndarray:
    """A tensor that is 0 but for one place."""
    part = np.zeros(delta.shape)
    part[place] = delta[place]
    return part


def cut(delta: np.ndarray, order: np.ndarray, pieces: int) -> list[np.ndarray]:
    """Pieces of `ceil(size / pieces)` entries in the order given."""
    length = ceil(delta.size / pieces)
    flat = delta.reshape(-1)
    return [
        only(flat, order[start : start + length]).reshape(delta.shape)
        for start in range(0, delta.size, length)
    ]


def parts_of(case: str, name: str, delta: np.ndarray) -> list[np.ndarray]:
    """What one expert changed in one tensor, part by part."""
    if case == "entry":
        return cut(delta, np.arange(delta.size), delta.size)
    query, output = ".query." in name, name.endswith("output.weight")
    if case == "head" and query:
        half = len(delta) // 2
        return [only(delta, slice(half)), only(delta, slice(half, None))]
    if case == "head" and output:
        half = delta.shape[1] // 2
        return [only(delta, np.s_[:, :half]), only(delta, np.s_[:, half:])]
    if matches(name, VECTORS if case.endswith(" and tables") else WHOLE):
        return [delta]
    if case in ("row", "row and tables"):
        return [only(delta, i) for i in range(delta.shape[0])]
    if case == "column":
        return [only(delta, np.s_[:, j]) for j in range(delta.shape[1])]
    if case in ("row_column", "row_column and tables"):
        rows = [only(delta, i) for i in range(delta.shape[0])]
        if delta.ndim != 2:
            return rows
        columns = [only(delta, np.s_[:, j]) for j in range(delta.shape[1])]
        return [part / 2 for part in rows + columns]
    if case in ("chunk", "chunk and tables"):
        return cut(delta, np.arange(delta.size), 5)
    if case == "uneven chunk":
        pieces = {
            "encoder.0.query.weight": 2,
            "encoder.1.query.weight": 4,
            "encoder.1.output.weight": 4,
            "encoder.2.kernel": 6,
            "pooler.weight": 5,
        }
        return cut(delta, np.arange(delta.size), pieces.get(name, 1))
    if case == "partition":
        return cut(delta, np.random.default_rng([3, delta.size]).permutation(delta.size), 5)
    if case in ("singular", "all singular") and delta.ndim == 2:
        u, s, v = np.linalg.svd(delta)
        if case == "all singular":
            return [s[i] * np.outer(u[:, i], v[i]) for i in range(len(s))]
        leading = [s[i] * np.outer(u[:, i], v[i]) for i in range(2)]
        return [*leading, delta - sum(leading)]
    return [delta]


@jax.jit
def mixed(base, deltas, scales):
    return materialize(mix(base, deltas, scales))


@functools.cache
def compiled(case: str) -> Callable[..., tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
    """Merged parameters and the gradients of coefficients; tests of a granularity share it."""
    granularity = made(case)

    def loss(values, base, deltas, cotangents):
        merged = materialize(mix(base, deltas, granularity.scales(values)))
        return sum(jnp.vdot(merged[name], cotangents[name]) for name in merged), merged

    both = jax.jit(jax.grad(loss, has_aux=True))

    def run(values: dict[str, Any]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        gradients, merged = both(values, BASE, prepared(granularity), COTANGENTS)
        return merged, gradients

    return run


@pytest.mark.parametrize("case", CASES)
def test_merge(case):
    values = random_values(made(case))
    merged, _ = compiled(case)(values)
    assert merged.keys() == SHAPES.keys()
    assert {name: array.shape for name, array in merged.items()} == SHAPES
    by_tensor, coefficients = unstacked(merged), unstack_values(values)
    for name, deltas in tensor_deltas().items():
        expected = TENSORS[name].astype(np.float64)
        for of_expert, delta in zip(coefficients[group_of(case, name)], deltas, strict=True):
            parts = parts_of(case, name, delta)
            assert of_expert.size == len(parts), name
            for coefficient, part in zip(of_expert.reshape(-1), parts, strict=True):
                expected = expected + np.float64(coefficient) * part
        np.testing.assert_allclose(by_tensor[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_coefficients(case):
    _, gradients = compiled(case)(random_values(made(case)))
    found, cotangents = unstack_values(gradients), unstacked(COTANGENTS)
    expected = {group: np.zeros(array.shape) for group, array in found.items()}
    for name, deltas in tensor_deltas().items():
        products = [
            [np.sum(part * cotangents[name]) for part in parts_of(case, name, delta)]
            for delta in deltas
        ]
        group = group_of(case, name)
        expected[group] += np.reshape(products, expected[group].shape)
    for group, array in found.items():
        np.testing.assert_allclose(array, expected[group], rtol=2e-5, atol=2e-5, err_msg=group)


def tensor_deltas() -> dict[str, np.ndarray]:
    """`[K, *shape]` by names without `*`, float64."""
    return {name: array.astype(np.float64) for name, array in unstacked(DELTAS).items()}


@pytest.mark.parametrize("case", CASES)
def test_the_same_coefficient_everywhere_is_task_arithmetic(case):
    granularity = made(case)
    values = granularity.init(constant(SHAPES, EXPERTS, 0.3))
    assert all(array.dtype == jnp.float32 for array in values.values())
    merged, _ = compiled(case)(values)
    for name, array in merged.items():
        total = DELTAS[name].astype(np.float64).sum(1 if is_stacked(name) else 0)
        np.testing.assert_allclose(array, BASE[name] + 0.3 * total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_stacked_and_single_tensors_agree(case):
    stacked, single = made(case), made(case, TENSOR_SHAPES)
    values = random_values(stacked)
    merged = unstacked(compiled(case)(values)[0])
    carried = {group: array[None] for group, array in unstack_values(values).items()}
    assert carried.keys() == single.init(constant(TENSOR_SHAPES, EXPERTS, 0.0)).keys()
    deltas = prepared(single, unstacked(DELTAS))
    apart = mixed(TENSORS, deltas, single.scales(carried))
    for name, array in apart.items():
        np.testing.assert_allclose(array, merged[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("case", ["chunk", "partition", "singular", "row"])
def test_bfloat16(case):
    names = ["pooler.weight", "encoder.*.query.weight"]
    granularity = made(case, {name: SHAPES[name] for name in names})
    halves = {name: DELTAS[name].astype(ml_dtypes.bfloat16) for name in names}
    base = {name: BASE[name] for name in names}
    values = granularity.init(constant({name: SHAPES[name] for name in names}, EXPERTS, 1.0))
    merged = mixed(base, prepared(granularity, halves), granularity.scales(values))
    for name, array in merged.items():
        total = halves[name].astype(np.float64).sum(1 if is_stacked(name) else 0)
        np.testing.assert_allclose(array, base[name] + total, rtol=1e-5, atol=1e-5)


def adapters() -> tuple[dict[str, LoadedDelta], dict[str, LoadedDelta]]:
    """Task vectors of LoRA experts, as factors and multiplied out.

    Of some parameters one expert was saved whole or not changed; the stacked `kernel` and the
    vectors are those of whole models.
    """
    factored: dict[str, LoadedDelta] = {name: DenseDelta(DELTAS[name]) for name in SHAPES}
    dense = dict(factored)
    experts = {"pooler.weight": (0, 2), "encoder.*.output.weight": (0, 2)}
    for seed, name in enumerate(SHAPES):
        if len(SHAPES[name]) - is_stacked(name) != 2:
            continue
        own = experts.get(name, tuple(range(EXPERTS)))
        *lead, _, m, n = delta_shape(name)
        low_rank = LowRankDelta(
            draw(500 + seed, *lead, len(own), m, 2), draw(600 + seed, *lead, len(own), 2, n)
        )
        factored[name] = low_rank
        values = np.zeros(delta_shape(name), np.float32)
        values[..., own, :, :] = low_rank.left @ low_rank.right
        if len(own) < EXPERTS:
            parts, positions = [low_rank], [own]
            if name == "encoder.*.output.weight":
                values[:, 1] = DELTAS[name][:, 1]
                parts.append(DenseDelta(values[:, 1:2]))
                positions.append((1,))
            factored[name] = JoinedDelta(tuple(parts), tuple(positions), EXPERTS)
        dense[name] = DenseDelta(values)
    return factored, dense


@pytest.mark.parametrize("case", CASES)
def test_factors_are_merged_as_their_products_are(case):
    granularity = made(case)
    scales = granularity.scales(random_values(granularity))
    merged, expected = (
        mixed(BASE, {name: granularity.prepare(name, own) for name, own in deltas.items()}, scales)
        for deltas in adapters()
    )
    for name, array in merged.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_tables_that_are_read_by_rows_stay_whole():
    """Also where their names do not say that they are embeddings, as T5's."""
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    shapes = {n: leaf.shape for n, leaf in family_of(config).build_backbone(config).shapes.items()}
    for name, options in (("row", {}), ("chunk", {"pieces": 4}), ("singular", {"rank": 2})):
        units = make_granularity(name, options, shapes).units
        assert units["shared.weight"] == "whole"
        tables = [table for table in shapes if "relative_attention_bias" in table]
        assert len(tables) == 2
        assert {units[table] for table in tables} == {"whole"}


def random_start() -> dict[str, np.ndarray]:
    return {
        name: draw(400 + seed, *array.shape)
        for seed, (name, array) in enumerate(constant(SHAPES, EXPERTS, 0.0).items())
    }


@pytest.mark.parametrize("case", CASES)
def test_init_takes_the_mean_over_the_tensors_of_a_group(case):
    start = random_start()
    found = unstack_values(made(case).init(start))
    by_tensor = unstacked({n: a if is_stacked(n) else a[0] for n, a in start.items()})
    members: dict[str, list[np.ndarray]] = {}
    for name, array in by_tensor.items():
        members.setdefault(group_of(case, name), []).append(array)
    assert found.keys() == members.keys()
    for group, array in found.items():
        mean = np.mean(members[group], axis=0)
        expected = np.broadcast_to(
            mean.reshape(EXPERTS, *(1 for _ in array.shape[1:])), array.shape
        )
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6, err_msg=group)


@pytest.mark.parametrize("case", CASES)
def test_init_of_single_tensors_is_that_of_stacked_ones(case):
    start = random_start()
    stacked = unstack_values(made(case).init(start))
    rows = {n: a if is_stacked(n) else a[0] for n, a in start.items()}
    apart = {name: array[None] for name, array in unstacked(rows).items()}
    single = unstack_values(made(case, TENSOR_SHAPES).init(apart))
    assert single.keys() == stacked.keys()
    for group, array in single.items():
        np.testing.assert_allclose(array.ravel(), stacked[group].ravel(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case not in ("task", "layer", "groups")]
)
def test_per_tensor_undoes_init(case):
    start, granularity = random_start(), made(case)
    found = per_tensor(granularity, granularity.init(start), SHAPES, EXPERTS)
    for name, array in found.items():
        np.testing.assert_allclose(array, start[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case != "entry" and not case.endswith(" and tables")]
)
def test_embeddings_and_vectors_stay_whole(case):
    granularity = made(case)
    start = granularity.init(constant(SHAPES, EXPERTS, 0.0))
    for name in SHAPES:
        if matches(name, WHOLE) and not (case == "head" and "query" in name):
            assert granularity.units[name] not in ("by row", "by column", "by head"), name
            delta = DenseDelta(DELTAS[name])
            assert granularity.prepare(name, delta) is delta
            if name in start:
                assert start[name].size == EXPERTS * (LAYERS if is_stacked(name) else 1)


def test_units():
    whole = {name: "whole" for name in SHAPES}
    cut = dict.fromkeys(
        [
            "stem.kernel",
            "pooler.weight",
            "encoder.*.query.weight",
            "encoder.*.output.weight",
            "encoder.*.kernel",
        ]
    )
    matrices = [name for name in cut if not name.endswith("kernel")]
    heads = ["encoder.*.query.weight", "encoder.*.query.bias", "encoder.*.output.weight"]
    assert made("tensor").units == whole
    assert made("row").units == whole | dict.fromkeys(cut, "by row")
    assert made("column").units == whole | dict.fromkeys(cut, "by column")
    assert made("head").units == whole | dict.fromkeys(heads, "by head")
    assert made("chunk").units == whole | dict.fromkeys(cut, "in 5 pieces")
    assert made("partition").units == whole | dict.fromkeys(cut, "in 5 random parts")
    assert made("singular").units == whole | dict.fromkeys(matrices, "by singular direction")
    assert made("task").units == dict.fromkeys(SHAPES, "all together")
    assert made("layer").units == dict.fromkeys(SHAPES, "by layer")
    assert made("groups").units == dict.fromkeys(SHAPES, "by group")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("task", "3 coefficients (21 tensors all together)"),
        # 8 layers: 3 blocks and logit_scale, embeddings, norm, stem, pooler.
        ("layer", "24 coefficients (21 tensors by layer)"),
        ("tensor", "63 coefficients (21 tensors whole)"),
        ("groups", "9 coefficients (21 tensors by group)"),
        # Rows: 4 + 6 outside the blocks, 4 + 6 + 2 in each.
        ("row", f"{3 * (10 + 3 * 12 + 10)} coefficients (10 tensors whole, 11 tensors by row)"),
        # And 7 tokens, and 6 units of the patch embedding.
        (
            "row and tables",
            f"{3 * (10 + 3 * 12 + 13 + 8)} coefficients (8 tensors whole, 13 tensors by row)",
        ),
        # Columns: 3 + 4 outside, 6 + 4 + 3 in each.
        ("column", f"{3 * (7 + 39 + 10)} coefficients (10 tensors whole, 11 tensors by column)"),
        ("head", f"{3 * (12 + 9 * 2)} coefficients (12 tensors whole, 9 tensors by head)"),
        ("chunk", f"{3 * (10 + 11 * 5)} coefficients (10 tensors whole, 11 tensors in 5 pieces)"),
        (
            "chunk and tables",
            f"{3 * (8 + 13 * 5)} coefficients (8 tensors whole, 13 tensors in 5 pieces)",
        ),
        (
            "partition",
            f"{3 * (10 + 11 * 5)} coefficients (10 tensors whole, 11 tensors in 5 random parts)",
        ),
        (
            "singular",
            f"{3 * (14 + 7 * 3)} coefficients (14 tensors whole, 7 tensors by singular direction)",
        ),
    ],
)
def test_count_units(case, words):
    granularity = made(case)
    values = granularity.init(constant(SHAPES, EXPERTS, 0.0))
    assert count_units(granularity, values, SHAPES) == words


def test_count_units_of_layers_cut_unlike():
    granularity = made("uneven chunk")
    values = granularity.init(constant(SHAPES, EXPERTS, 0.0))
    # 5 tensors in 2 + 4 + 4 + 6 + 5 pieces and 16 whole.
    assert count_units(granularity, values, SHAPES).startswith(f"{3 * (21 + 16):,} coefficients")
    for name in ("encoder.0.query.weight", "encoder.2.kernel"):
        assert values[name].shape == (1, EXPERTS, UNEVEN[name])


def test_large_numbers_have_commas():
    shapes = {"dense.weight": (400, 2)}
    granularity = GRANULARITIES["row"](shapes)
    values = granularity.init(constant(shapes, 3, 0.0))
    assert count_units(granularity, values, shapes) == "1,200 coefficients (1 tensors by row)"


@pytest.mark.parametrize("seed", [0, 1])
def test_partition_depends_on_the_seed_alone(seed):
    shapes = {"a.weight": (4, 6), "b.weight": (6, 4)}
    granularity = make_granularity("partition", {"groups": 4, "seed": seed}, shapes)
    again = make_granularity("partition", {"groups": 4, "seed": seed}, {"a.weight": (4, 6)})
    numbers = np.arange(24, dtype=np.float32)
    a = granularity.prepare("a.weight", DenseDelta(numbers.reshape(1, 4, 6)))
    b = granularity.prepare("b.weight", DenseDelta(numbers.reshape(1, 6, 4)))
    c = again.prepare("a.weight", DenseDelta(numbers.reshape(1, 4, 6)))
    np.testing.assert_array_equal(a.deltas.values, b.deltas.values)
    np.testing.assert_array_equal(a.deltas.values, c.deltas.values)
    other = make_granularity("partition", {"groups": 4, "seed": seed + 1}, shapes)
    d = other.prepare("a.weight", DenseDelta(numbers.reshape(1, 4, 6)))
    assert not np.array_equal(a.deltas.values, d.deltas.values)


def test_singular_directions_of_a_matrix_of_that_rank_have_no_rest():
    shapes = {"dense.weight": (5, 4)}
    granularity = GRANULARITIES["singular"](shapes, rank=2)
    low = (draw(0, 3, 5, 2) @ draw(1, 3, 2, 4)).astype(np.float32)
    delta = granularity.prepare("dense.weight", DenseDelta(low))
    assert delta.rest is None
    scale = draw(2, 3, 3)
    u, s, v = np.linalg.svd(low.astype(np.float64))
    expected = sum(
        scale[k, i] * s[k, i] * np.outer(u[k, :, i], v[k, i]) for k in range(3) for i in range(2)
    )
    np.testing.assert_allclose(delta.weighted_sum(scale), expected, rtol=1e-4, atol=1e-4)


# Shares of c: 1/4, 1/4, 1/2; of m: 3/4, 1/4, 0; of p: 4/9, 4/9, 1/9. So the scores are about
# 1.44, 0.94, 0.61, and cuts happen in the order a, b, a, b, a, ... The bias is never cut.


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chunk", {"pieces": 25}, "pooler.weight has 24 entries and cannot be cut into 25 pieces"),
        ("chunk", {"pieces": 0}, "pieces is 0, expected a whole number, at least 1"),
        ("chunk", {"pieces": {"encoder.1.query.*": 25}}, "encoder.1.query.weight has 24 entries"),
        (
            "chunk",
            {"pieces": {"encoder.0.query.*": 2, "encoder.1.query.*": 3}},
            "encoder.*.query.weight cannot be cut into 2, 3, 1 pieces; each number must divide the",
        ),
        (
            "chunk",
            {"pieces": {"encoder.0.query.*": 5}},
            "encoder.*.query.weight cannot be cut into 5, 1, 1 pieces; .* the tensor's 24 entries",
        ),
        *(
            ("chunk", {"pieces": found}, "pieces is .*, expected a whole number, at least 1$")
            for found in ("many", 2.5, 4.0, True, None, [4])
        ),
        *(
            (
                "chunk",
                {"pieces": {"pooler.*": found}},
                r"the number of pieces of 'pooler.\*' is .*, expected a whole number, at least 1$",
            )
            for found in ("many", 2.0, 0, [2])
        ),
        ("chunk", {"pieces": {1: 4}}, "pieces are for 1, expected a name pattern in quotes"),
        ("chunk", {"pieces": 2, "tables": 3}, "tables is 3, expected true or false"),
        ("row", {"tables": "no"}, "tables is 'no', expected true or false"),
        ("chunk", {}, "chunk says: missing a required argument: 'pieces'; its options are pieces"),
        ("partition", {"groups": 25}, "cannot be cut into 25 pieces"),
        *(
            ("partition", {"groups": found}, "groups is .*, expected a whole number")
            for found in (0, 4.0, "4", {"pooler.*": 4})
        ),
        *(
            ("partition", {"groups": 4, "seed": found}, "seed is .*, expected a whole number")
            for found in (-1, 1.5, "first")
        ),
        ("partition", {"pieces": 4}, "partition says: .*; its options are groups, seed"),
        ("singular", {"rank": 5}, r"of shape \(.*\) has 4 singular directions, fewer than rank 5"),
        *(
            ("singular", {"rank": found}, "rank is .*, expected a whole number")
            for found in (-1, 1.5, 2.0, "high")
        ),
        ("head", {"heads": {"*.absent.*": (0, 2)}}, "no merged parameter has attention heads"),
        ("head", {"heads": {}}, "no merged parameter has attention heads"),
        (
            "head",
            {"heads": {"*.query.weight": (0, 3)}},
            r"encoder.*query.weight has 4 units along axis 0, which is no multiple of 3 heads",
        ),
        *(
            ("head", {"heads": found}, "heads is .*, expected axis and number of heads by name")
            for found in (2, "*", {"*.query.*": 2}, {"*.query.*": [0, 2, 1]}, {1: [0, 2]})
        ),
        *(
            (
                "head",
                {"heads": {"*.query.weight": found}},
                r"the (axis|number) of '\*.query.weight' in heads is .*, expected a whole number",
            )
            for found in ((0, 0), (0, 2.0), (-1, 2), ("row", 2))
        ),
        *(
            ("groups", {"patterns": {"a": found}}, "the patterns of 'a' are .*, expected a list of")
            for found in ("encoder.0.*", 3, [3], None)
        ),
        ("groups", {"patterns": ["*.query.*"]}, "patterns is .*, expected lists of name patterns"),
        ("groups", {"patterns": {1: ["*.query.*"]}}, "a group is called 1, expected a text"),
        ("groups", {"patterns": {"*.query.*": ["*.query.*"]}}, "a name without '\\*'"),
        ("row", {"pieces": 2}, "row says: .*'pieces'; its options are tables"),
        ("rows", {}, "found 'rows'; expected one of .* \\(nearest is 'row'\\)"),
        ("no_such_module:f", {}, "'no_such_module:f' cannot be imported"),
        ("math:no_such_function", {}, "'math:no_such_function' cannot be imported"),
        (":f", {}, "':f' cannot be imported"),
        ("math:pi", {}, "'math:pi' is not marked as an extension"),
        ("math:floor", {}, "'math:floor' is not marked as an extension"),
        ("unittest.mock:call", {}, "is not marked as an extension"),
    ],
)
def test_bad_options(name, options, message):
    allow_code([name])
    with pytest.raises(InputError, match=message) as error:
        make_granularity(name, options, SHAPES)
    assert str(error.value).startswith("coefficients.granularity")
    assert "\n" not in str(error.value)


def test_ones_own_granularity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "my_granularities"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "bias.py").write_text(
        "from adamerge_jax import extension\n"
        "from adamerge_jax.coefficients.granularities import groups\n"
        "\n"
        "@extension\n"
        "def apart(shapes, pattern='*.bias'):\n"
        "    return groups(shapes, {'apart': [pattern]})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    allow_code(["my_granularities.bias:apart"])
    own = make_granularity("my_granularities.bias:apart", {"pattern": "*.query.bias"}, SHAPES)
    values = own.init(constant(SHAPES, EXPERTS, 0.3))
    assert {group: array.shape for group, array in values.items()} == {
        "apart": (1, EXPERTS),
        "others": (1, EXPERTS),
    }
    values = random_values(own)
    merged = mixed(BASE, prepared(own), own.scales(values))
    for name, array in merged.items():
        scale = values["apart" if name.endswith("query.bias") else "others"][0]
        summed = np.einsum("k,...k->...", scale, np.moveaxis(DELTAS[name], is_stacked(name), -1))
        np.testing.assert_allclose(array, BASE[name] + summed, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"apart says: .*'patern'; its options are pattern$"):
        make_granularity("my_granularities.bias:apart", {"patern": "*.bias"}, SHAPES)


NAMES: dict[str, tuple[int, ...]] = {
    "bert.embeddings.word_embeddings.weight": (7, 4),
    "bert.encoder.layer.*.output.dense.weight": (2, 4, 4),
    "bert.encoder.layer.*.output.dense.bias": (2, 4),
    "bert.pooler.dense.bias": (4,),
}


@pytest.mark.parametrize(
    ("granularity", "groups"),
    [
        ("task", {"all": 1}),
        (
            "layer",
            {
                "bert.embeddings": 1,
                "bert.encoder.layer.0": 1,
                "bert.encoder.layer.1": 1,
                "bert.pooler": 1,
            },
        ),
        ("tensor", {name: 2 if "*" in name else 1 for name in NAMES}),
    ],
)
def test_groups(granularity, groups):
    values = GRANULARITIES[granularity](NAMES).init(constant(NAMES, 3, 0.3))
    assert {group: array.shape for group, array in values.items()} == {
        group: (size, 3) for group, size in groups.items()
    }
    for array in values.values():
        assert array.dtype == jnp.float32
        np.testing.assert_allclose(array, np.float32(0.3), rtol=1e-6)


@pytest.mark.parametrize("case", ["task", "layer", "tensor", "groups"])
def test_scales_of_whole_tensors_broadcast(case):
    granularity = made(case)
    for name, scale in granularity.scales(random_values(granularity)).items():
        lead = (LAYERS, EXPERTS) if is_stacked(name) else (EXPERTS,)
        assert scale.shape == lead + (1,) * (len(delta_shape(name)) - len(lead))


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (
            BertConfig(num_hidden_layers=2),
            {
                "bert.embeddings.word_embeddings.weight": "bert.embeddings",
                "bert.embeddings.LayerNorm.bias": "bert.embeddings",
                "bert.encoder.layer.1.attention.self.query.weight": "bert.encoder.layer.1",
                "bert.pooler.dense.weight": "bert.pooler",
            },
        ),
        (
            ViTConfig(num_hidden_layers=2),
            {
                "vit.embeddings.cls_token": "vit.embeddings",
                "vit.embeddings.patch_embeddings.projection.weight": "vit.embeddings",
                "vit.layernorm.weight": "vit.layernorm",
            },
        ),
        (
            CLIPConfig(vision_config=dict(num_hidden_layers=2)),
            {
                "vision_model.embeddings.class_embedding": "vision_model.embeddings",
                "vision_model.pre_layrnorm.weight": "vision_model.pre_layrnorm",
                "vision_model.encoder.layers.0.mlp.fc1.bias": "vision_model.encoder.layers.0",
                "vision_model.post_layernorm.bias": "vision_model.post_layernorm",
                "visual_projection.weight": "visual_projection",
            },
        ),
    ],
)
def test_layers_of_models(config, layers):
    network = family_of(config).build_backbone(config)
    names = shapes_in_file(network)
    found = {name: layer_of(name, names) for name in names}
    assert {name: found[name] for name in layers} == layers
    blocks = {layer for layer in found.values() if layer[-1].isdigit()}
    # Two blocks, and only the modules named above beside them.
    assert {layer.rpartition(".")[2] for layer in blocks} == {"0", "1"}
    assert set(found.values()) == blocks | set(layers.values())
    # The same layers where they are stacked.
    for name in network.shapes:
        layer = layer_of(name, network.shapes)
        assert layer.replace("*", "1") == found[name.replace("*", "1")]


def test_a_tensor_beside_a_stack_is_in_its_layer():
    # T5's first block alone has a table of relative positions.
    shapes = {"block.*.q.weight": (3, 4, 4), "block.0.positions.weight": (6, 2)}
    single = {f"block.{index}.q.weight": (4, 4) for index in range(3)}
    single["block.0.positions.weight"] = (6, 2)
    stacked, apart = (GRANULARITIES["layer"](own) for own in (shapes, single))
    start = {"block.*.q.weight": draw(0, 3, EXPERTS), "block.0.positions.weight": draw(1, 1, 3)}
    values = stacked.init(start)
    assert {group: array.shape for group, array in values.items()} == {
        f"block.{index}": (1, EXPERTS) for index in range(3)
    }
    expected = (start["block.*.q.weight"][0] + start["block.0.positions.weight"][0]) / 2
    np.testing.assert_allclose(values["block.0"][0], expected, rtol=1e-6)
    # What is written to a file and read by the names in a checkpoint is what was learned.
    written = {group: array[None] for group, array in unstack_values(values).items()}
    scales = apart.scales(written)
    learned = stacked.scales(values)
    for index in range(3):
        np.testing.assert_array_equal(
            scales[f"block.{index}.q.weight"], learned["block.*.q.weight"][index]
        )
    np.testing.assert_array_equal(
        scales["block.0.positions.weight"], learned["block.0.positions.weight"]
    )


def test_layers_without_numbered_blocks():
    assert layer_of("logit_scale", ["logit_scale", "a.weight"]) == "logit_scale"
    assert layer_of("a.b.weight", ["logit_scale", "a.b.weight"]) == "a"
    # What is around all parameters is no layer.
    linen = ["params.Dense_0.kernel", "params.Dense_0.bias", "params.Dense_1.kernel"]
    assert [layer_of(name, linen) for name in linen] == 2 * ["params.Dense_0"] + ["params.Dense_1"]


def test_columns_along_the_last_axis_are_the_output_units_of_flax():
    shapes = {"conv.kernel": (3, 3, 4, 8), "dense.kernel": (4, 6), "stack.*.kernel": (2, 4, 6)}
    granularity = make_granularity("column", {"axis": -1}, shapes)
    values = granularity.init(constant(shapes, experts=2, value=0.3))
    sizes = {name: scale.shape for name, scale in granularity.scales(values).items()}
    assert sizes["conv.kernel"] == (2, 1, 1, 1, 8)
    assert sizes["dense.kernel"] == (2, 1, 6) and sizes["stack.*.kernel"] == (2, 2, 1, 6)
    for axis in (0, 2, True):
        with pytest.raises(InputError, match="axis is"):
            make_granularity("column", {"axis": axis}, shapes)


def test_names_that_moved_are_found_for_one_release():
    with pytest.warns(DeprecationWarning, match="parameter_names"):
        assert granularities.layer_of is layer_of
    with pytest.warns(DeprecationWarning, match="along_axes"):
        assert "row" in granularities.ALONG_AXES
    with pytest.raises(AttributeError, match="rows"):
        _ = granularities.rows
