"""Task vectors outside the device: the same sums and gradients, and less memory."""

import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from adamerge_jax.checkpoints.dtypes import DELTA_DTYPES
from adamerge_jax.errors import InputError
from adamerge_jax.interference import FittedStep
from adamerge_jax.mixing import Mixture, materialize
from adamerge_jax.pipeline.learn import learn_coefficients
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.pipeline.read import load_task_vectors
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.task_vectors import DenseDelta, LoadedDelta, QuantizedDelta, StreamedDelta
from adamerge_jax.task_vectors.offload.memory import DiskMemory, Memory, make_memory
from adamerge_jax.task_vectors.offload.scratch import Scratch
from adamerge_jax.task_vectors.quantized import quantize
from adamerge_jax.task_vectors.row_column import by_row_and_column
from tests.references import learning_inputs

EXPERTS, LAYERS, ROWS, COLUMNS = 4, 3, 6, 5

# Float32 sums of four terms in another order.
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def quantized(values: np.ndarray, leading: int) -> QuantizedDelta:
    rows = values.reshape(-1, *values.shape[leading:])
    integers, steps = zip(*(quantize(row, np.dtype(np.int8)) for row in rows), strict=True)
    steps = np.stack(steps)
    return QuantizedDelta(
        np.stack(integers).reshape(values.shape),
        steps.reshape(*values.shape[:leading], *steps.shape[1:]),
    )


KINDS = {
    "float32": lambda values, leading: DenseDelta(values),
    "bfloat16": lambda values, leading: DenseDelta(values.astype(ml_dtypes.bfloat16)),
    "int8": quantized,
}


def kept(place: str, delta: LoadedDelta, *, stacked: bool) -> LoadedDelta:
    return make_memory(place).keep("layer.*.weight" if stacked else "weight", delta)


@jax.jit
def sums_and_gradient(delta, base, scale, cotangent):
    """The merged parameter, layer by layer, and the gradient of the scale."""

    def loss(scale):
        merged = materialize({"layer": {"*": Mixture(base, delta, scale)}})["layer"]["*"]
        return jnp.vdot(merged, cotangent), merged

    gradient, merged = jax.grad(loss, has_aux=True)(scale)
    return merged, gradient


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize(
    ("kind", "along"),
    [("float32", (1, 1)), ("float32", (ROWS, 1)), ("bfloat16", (ROWS, 1)), ("int8", (ROWS, 1))],
)
def test_sums_and_gradients_are_those_on_the_device(place, kind, along):
    delta = KINDS[kind](draw(0, LAYERS, EXPERTS, ROWS, COLUMNS), 2)
    base, cotangent = draw(1, LAYERS, ROWS, COLUMNS), draw(2, LAYERS, ROWS, COLUMNS)
    scale = draw(3, LAYERS, EXPERTS, *along)
    streamed = kept(place, delta, stacked=True)
    assert isinstance(streamed, StreamedDelta)
    found = sums_and_gradient(streamed, base, scale, cotangent)
    expected = sums_and_gradient(kept("device", delta, stacked=True), base, scale, cotangent)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, **TOLERANCE)
    values = np.asarray(delta.values, np.float64)
    if kind == "int8":
        values = values * delta.steps
    np.testing.assert_allclose(found[0], base + (scale * values).sum(1), **TOLERANCE)


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_on_the_device(place, kind):
    delta = KINDS[kind](draw(0, EXPERTS, ROWS, COLUMNS), 1)
    base, scale, index = draw(1, ROWS, COLUMNS), draw(2, EXPERTS, 1, 1), np.array([[1, 3], [0, 1]])
    rows = [
        jax.jit(Mixture.rows)(Mixture(base, kept(where, delta, stacked=False), scale), index)
        for where in (place, "device")
    ]
    np.testing.assert_allclose(*rows, **TOLERANCE)


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("seed", [None, 5])
def test_pieces_are_those_on_the_device(place, seed):
    values, base = draw(0, LAYERS, EXPERTS, ROWS, COLUMNS), draw(1, LAYERS, ROWS, COLUMNS)
    scale, cotangent = draw(3, LAYERS, EXPERTS, 4, 1), draw(2, LAYERS, ROWS, COLUMNS)
    cut = [
        kept(where, DenseDelta(values), stacked=True).in_pieces(4, stacked=True, seed=seed)
        for where in (place, "device")
    ]
    assert isinstance(cut[0].deltas, StreamedDelta)
    found, expected = (sums_and_gradient(delta, base, scale, cotangent) for delta in cut)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("place", ["host", "disk"])
def test_singular_directions_are_those_on_the_device(place):
    values, base = draw(0, LAYERS, EXPERTS, ROWS, COLUMNS), draw(1, LAYERS, ROWS, COLUMNS)
    scale, cotangent = draw(3, LAYERS, EXPERTS, 3), draw(2, LAYERS, ROWS, COLUMNS)
    split = [
        kept(where, DenseDelta(values), stacked=True).by_direction(2) for where in (place, "device")
    ]
    assert isinstance(split[0], StreamedDelta)
    found, expected = (sums_and_gradient(delta, base, scale, cotangent) for delta in split)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("place", ["host", "disk"])
def test_rows_and_columns_are_scaled_as_on_the_device(place):
    values, base = draw(0, LAYERS, EXPERTS, ROWS, COLUMNS), draw(1, LAYERS, ROWS, COLUMNS)
    scale, cotangent = draw(3, LAYERS, EXPERTS, ROWS + COLUMNS), draw(2, LAYERS, ROWS, COLUMNS)
    laid_out = [
        by_row_and_column(kept(where, DenseDelta(values), stacked=True), ROWS)
        for where in (place, "device")
    ]
    assert isinstance(laid_out[0], StreamedDelta)
    found, expected = (sums_and_gradient(delta, base, scale, cotangent) for delta in laid_out)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_those_on_the_device(place, kind):
    delta = KINDS[kind](draw(0, LAYERS, EXPERTS, ROWS, COLUMNS), 2)
    norms = [kept(where, delta, stacked=True).norms(stacked=True) for where in (place, "device")]
    np.testing.assert_allclose(*norms, rtol=1e-6)


def test_host_arrays_are_sliced_once_and_moved_at_once():
    """What XLA asks of arrays in host memory; on an accelerator anything else would compute there.

    The CPU's own memory is the host's: there it is the program that can be looked at.
    """
    delta = kept("host", DenseDelta(draw(0, LAYERS, EXPERTS, ROWS, COLUMNS)), stacked=True)
    array = delta.source.delta.values
    assert array.sharding.memory_kind == "pinned_host"
    base, scale = draw(1, LAYERS, ROWS, COLUMNS), draw(2, LAYERS, EXPERTS, 1, 1)
    jaxpr = jax.make_jaxpr(sums_and_gradient)(delta, base, scale, base)
    used = uses_of_host_memory(jaxpr.jaxpr)
    assert set(used) == {"dynamic_slice", "squeeze", "reshape", "device_put"} & set(used)
    # Once in the forward and once in the backward pass.
    assert used.count("dynamic_slice") == used.count("device_put") == 2


def uses_of_host_memory(jaxpr) -> list[str]:
    """Names of the operations, not those that only contain others, that are given host arrays."""
    found = []
    for equation in jaxpr.eqns:
        inner = list(jax.core.jaxprs_in_params(equation.params))
        for each in inner:
            found += uses_of_host_memory(each)
        spaces = {getattr(v.aval, "memory_space", None) for v in equation.invars}
        if not inner and jax.memory.Space.Host in spaces:
            found.append(equation.primitive.name)
    return found


@pytest.mark.parametrize("place", ["host", "disk"])
def test_memory_on_the_device_does_not_grow_with_the_experts(place):
    def peak(experts: int) -> int:
        delta = kept(place, DenseDelta(draw(0, 2, experts, 64, 64)), stacked=True)
        base, scale = draw(1, 2, 64, 64), draw(2, 2, experts, 1, 1)
        compiled = sums_and_gradient.lower(delta, base, scale, base).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak(12) <= 1.05 * peak(2)


def test_scratch_file_has_no_name_and_lies_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    scratch = Scratch()
    array = scratch.empty((2, 3), np.dtype(np.float32))
    array[1][...] = np.array([1, 2, 3])
    np.testing.assert_array_equal(np.asarray(array), [[0, 0, 0], [1, 2, 3]])
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    array = Scratch().empty((4,), np.dtype(np.float32))
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(InputError, match=r"task_vectors.memory: .* has no room .* set TMPDIR"):
        array[...] = 1


def test_what_is_in_the_file_is_not_written_again():
    memory: Memory = DiskMemory()
    entries = memory.empty((EXPERTS, ROWS, COLUMNS), np.dtype(np.float32))
    for row, values in zip(entries, draw(0, EXPERTS, ROWS, COLUMNS), strict=True):
        row[...] = values
    delta = memory.keep("weight", DenseDelta(entries))
    assert delta.source.delta.values is entries
    np.testing.assert_array_equal(delta.source.loaded().values, draw(0, EXPERTS, ROWS, COLUMNS))


def learned(fields: dict[str, Any], folder: Path, **task_vectors: str) -> dict[str, np.ndarray]:
    recipe = parse_recipe(
        fields
        | {"task_vectors": task_vectors, "coefficients": {"granularity": "row"}}
        | {"learning": {"steps": 3, "batch_size": 4, "optimizer": {"learning_rate": 0.01}}}
    )
    inputs = learning_inputs(recipe, folder)
    merge = learn_coefficients(inputs, show_stage=lambda *_: nullcontext(lambda progress: None))
    # Baselines and the merge itself take the same deltas as a whole.
    merged = merge.parameters(inputs.base)
    return {f"merged {name}": array for name, array in merged.items()} | dict(merge.values)


def test_learned_coefficients_are_those_on_the_device(image_recipe, tmp_path):
    """A whole network, its embeddings, its stack of layers and its norms among them."""
    expected = learned(image_recipe, tmp_path)
    for place in ("host", "disk"):
        found = learned(image_recipe, tmp_path, memory=place)
        assert found.keys() == expected.keys()
        for name, values in found.items():
            # Three steps of Adam, which divides by the gradient's size, at 0.01 each.
            np.testing.assert_allclose(values, expected[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("place", "dtype"), [("device", "int8"), ("disk", None), ("disk", "int8")])
def test_interference_steps_come_before_rounding_and_moving(image_recipe, tmp_path, place, dtype):
    recipe = parse_recipe(image_recipe)
    models = open_models(recipe, tmp_path)
    steps = [FittedStep("trim", {"density": 0.5})]
    plain, names, _ = load_task_vectors(models, None, steps)
    deltas, same, _ = load_task_vectors(
        models, DELTA_DTYPES[dtype] if dtype else None, steps, make_memory(place)
    )
    assert same == names and deltas.keys() == plain.keys()
    for name, delta in deltas.items():
        if isinstance(delta, StreamedDelta):
            delta = delta.source.loaded()
        expected, allowed = np.asarray(plain[name].values), 0.0
        values = np.asarray(delta.values)
        if dtype:
            steps_of_rows = np.asarray(delta.steps)
            values, allowed = values * steps_of_rows, steps_of_rows * (0.5 + 1e-4)
        assert np.all(np.abs(values - expected) <= allowed), name
