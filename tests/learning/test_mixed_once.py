"""One mix a step: the gradients are those of mixing in every part."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adamerge_jax.coefficients.axes import row
from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.granularities import constant
from adamerge_jax.data.batches import Batch
from adamerge_jax.learning.learner import Frozen, State, make_learner
from adamerge_jax.mixing import is_lazy
from adamerge_jax.objectives import Targets, TaskOutputs, entropy
from adamerge_jax.task_vectors import (
    Delta,
    DenseDelta,
    JoinedDelta,
    LowRankDelta,
    QuantizedDelta,
)
from adamerge_jax.task_vectors.offload.scratch import Scratch, ScratchArray
from adamerge_jax.task_vectors.offload.streamed import (
    DiskSource,
    HostSource,
    StreamedDelta,
    apart_from_layers,
    with_sources,
)

EXPERTS, LAYERS, SIZE, PARTS = 3, 2, 6, 4
MATRIX, VECTOR = "layers.*.weight", "bias"
GENERATOR = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return GENERATOR.standard_normal(shape, np.float32)


BASE = {MATRIX: random(LAYERS, SIZE, SIZE), VECTOR: random(SIZE), "kept": random(SIZE)}
VALUES = random(LAYERS, EXPERTS, SIZE, SIZE)
OF_VECTOR = random(EXPERTS, SIZE)
FACTORS = [random(LAYERS, EXPERTS, SIZE, 1), random(LAYERS, EXPERTS, 1, SIZE)]
BATCH = Batch({"x": random(2 * 8, SIZE)}, np.full((2, 8), 1 / 8, np.float32), [Targets()] * 2)


def quantized() -> QuantizedDelta:
    steps = np.abs(VALUES).max(-1, keepdims=True) / 127
    return QuantizedDelta(np.round(VALUES / steps).astype(np.int8), steps)


def joined() -> JoinedDelta:
    dense, factors = DenseDelta(VALUES[:, :1]), LowRankDelta(*(f[:, 1:] for f in FACTORS))
    return JoinedDelta((dense, factors), ((0,), (1, 2)), EXPERTS)


KINDS: dict[str, Callable[[], Delta]] = {
    "dense": lambda: DenseDelta(VALUES),
    "bfloat16": lambda: DenseDelta(jnp.asarray(VALUES, jnp.bfloat16)),
    "int8": quantized,
    "host": lambda: StreamedDelta(HostSource.put(DenseDelta(VALUES)), jnp.arange(LAYERS)),
    "disk": lambda: StreamedDelta(
        DiskSource.put(DenseDelta(VALUES), Scratch()), jnp.arange(LAYERS)
    ),
    "low rank": lambda: LowRankDelta(*FACTORS),
    "joined": joined,
}


def forward(parameters, heads, inputs):
    """A residual network whose layers are scanned, as models' are."""
    layers, sources = apart_from_layers(parameters[MATRIX])

    def layer(x, weight):
        weight = with_sources(weight, sources)
        product = weight.apply(x) if is_lazy(weight) else x @ weight.T
        return x + jnp.tanh(product), None

    x, _ = jax.lax.scan(jax.checkpoint(layer), inputs["x"] * parameters["kept"], layers)
    bias = parameters[VECTOR]
    logits = x + (bias.materialize() if is_lazy(bias) else bias)
    return [TaskOutputs(of_task) for of_task in jnp.split(logits, 2)]


def one_step(delta: Delta, *, mixes_once: bool, base=BASE) -> State:
    deltas = {MATRIX: delta, VECTOR: DenseDelta(OF_VECTOR)}
    shapes = {name: BASE[name].shape for name in deltas}
    granularity = row(shapes)
    learner = make_learner(
        forward,
        granularity,
        CONSTRAINTS["free"],
        entropy(),
        optax.sgd(1.0),
        microbatches=PARTS,
        mixes_once=mixes_once,
    )
    state = learner.init(granularity.init(constant(shapes, EXPERTS, 0.3)))
    return learner.step(state, Frozen(base, deltas, ()), BATCH)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_mixing_in_every_part(kind):
    once, often = (one_step(KINDS[kind](), mixes_once=mixes) for mixes in (True, False))
    moved = 0.0
    for group, values in often.raw.items():
        np.testing.assert_allclose(once.raw[group], values, atol=1e-5, err_msg=group)
        moved = max(moved, float(np.abs(values - 0.3).max()))
    assert moved > 0.01


def test_task_vectors_are_read_twice_a_step(monkeypatch):
    reads, read = [], ScratchArray.__array__

    def counted(array: ScratchArray, *arguments, **options):
        reads.append(array.shape)
        return read(array, *arguments, **options)

    monkeypatch.setattr(ScratchArray, "__array__", counted)
    for mixes_once, times in ((True, 2), (False, 3 * PARTS)):
        reads.clear()
        jax.block_until_ready(one_step(KINDS["disk"](), mixes_once=mixes_once).raw)
        assert reads.count((SIZE, SIZE)) == times * LAYERS * EXPERTS


def test_many_parts_in_half_precision_do_not_round_each_other_away():
    half = {name: jnp.asarray(array, jnp.bfloat16) for name, array in BASE.items()}
    once, exact = (
        one_step(KINDS["dense"](), mixes_once=True, base=base).raw for base in (half, BASE)
    )
    for group, values in exact.items():
        assert np.abs(once[group] - values).max() < 0.05 * np.abs(values - 0.3).max() + 1e-3
