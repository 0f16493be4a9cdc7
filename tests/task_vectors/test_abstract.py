"""Task vectors without arrays: prepared abstractly, they have the shapes of real ones."""

from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from adamerge_jax.coefficients.granularities import constant, make_granularity
from adamerge_jax.errors import InputError
from adamerge_jax.task_vectors import DenseDelta, JoinedDelta, LoadedDelta, LowRankDelta
from adamerge_jax.task_vectors.offload.memory import AbstractMemory, DeviceMemory
from adamerge_jax.task_vectors.quantized import QuantizedDelta, QuantizedEntries, quantize

LAYERS, EXPERTS, ROWS, COLUMNS = 2, 3, 6, 5
SHAPES = {"layer.*.weight": (LAYERS, ROWS, COLUMNS), "weight": (ROWS, COLUMNS)}

GRANULARITIES: dict[str, dict[str, Any]] = {
    "task": {},
    "layer": {},
    "tensor": {},
    "groups": {"patterns": {"first": ["layer.0.*"]}},
    "row": {},
    "column": {},
    "row_column": {},
    "head": {"heads": {"*": (0, 2)}},
    "chunk": {"pieces": 4},
    "partition": {"groups": 4, "seed": 1},
    "singular": {"rank": 2},
    "entry": {},
}
CUT_ACROSS_ROWS = ("chunk", "partition", "singular", "entry")


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dense(leading: tuple[int, ...], experts: int, dtype: Any = np.float32) -> DenseDelta:
    return DenseDelta(draw(0, *leading, experts, ROWS, COLUMNS).astype(dtype))


def low_rank(leading: tuple[int, ...], experts: int, rank: int) -> LowRankDelta:
    return LowRankDelta(
        draw(1, *leading, experts, ROWS, rank), draw(2, *leading, experts, rank, COLUMNS)
    )


def int8(leading: tuple[int, ...], experts: int) -> QuantizedDelta:
    matrices = draw(3, *leading, experts, ROWS, COLUMNS)
    values, steps = zip(
        *(quantize(matrix, np.dtype(np.int8)) for matrix in matrices.reshape(-1, ROWS, COLUMNS)),
        strict=True,
    )
    shape = (*leading, experts)
    return QuantizedDelta(
        np.stack(values).reshape(matrices.shape), np.stack(steps).reshape(*shape, ROWS, 1)
    )


def joined(leading: tuple[int, ...]) -> JoinedDelta:
    parts = (low_rank(leading, 1, 3), dense(leading, 2))
    return JoinedDelta(parts, ((1,), (0, 2)), EXPERTS)


REPRESENTATIONS = {
    "dense": lambda leading: dense(leading, EXPERTS),
    "bfloat16": lambda leading: dense(leading, EXPERTS, ml_dtypes.bfloat16),
    "rank 1": lambda leading: low_rank(leading, EXPERTS, 1),
    "rank 2": lambda leading: low_rank(leading, EXPERTS, 2),
    "rank 3": lambda leading: low_rank(leading, EXPERTS, 3),
    "int8": lambda leading: int8(leading, EXPERTS),
    "joined": joined,
}


def outline(delta: Any) -> Any:
    """Structure, shapes and dtypes of a delta, all static fields included."""
    return jax.tree.map(lambda array: (array.shape, array.dtype), delta)


def require_abstract(delta: LoadedDelta) -> None:
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(delta))


@pytest.mark.parametrize("kind", REPRESENTATIONS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_prepared_abstractly_as_really(granularity, name, kind):
    delta = REPRESENTATIONS[kind](SHAPES[name][:-2])
    made = make_granularity(granularity, GRANULARITIES[granularity], SHAPES)
    abstract = AbstractMemory().keep(name, delta)
    require_abstract(abstract)
    if kind == "int8" and granularity in CUT_ACROSS_ROWS:
        for either in (delta, abstract):
            with pytest.raises(InputError, match="int8"):
                made.prepare(name, either)
        return
    prepared = made.prepare(name, abstract)
    require_abstract(prepared)
    real = made.prepare(name, DeviceMemory().keep(name, delta))
    assert outline(prepared) == outline(real)
    if name == "weight":
        start = constant(SHAPES, EXPERTS, 0.3)
        scales = jax.eval_shape(lambda: made.scales(made.init(start)))
        merged = jax.eval_shape(lambda d, scale: d.weighted_sum(scale), prepared, scales[name])
        assert merged.shape == SHAPES[name]


def test_abstract_entries_are_filled_like_arrays():
    memory = AbstractMemory()
    entries = memory.empty((LAYERS, EXPERTS, ROWS, COLUMNS), np.dtype(np.int8))
    steps = memory.empty((LAYERS, EXPERTS, ROWS, 1), np.dtype(np.float32))
    both = QuantizedEntries(entries, steps)
    assert len(both) == LAYERS
    for layer in both:
        for expert in layer:
            expert[...] = draw(0, ROWS, COLUMNS)
    kept = memory.keep("layer.*.weight", QuantizedDelta(entries, steps))
    require_abstract(kept)
    assert outline(kept) == outline(int8((LAYERS,), EXPERTS))
