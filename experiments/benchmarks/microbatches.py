"""A step in parts, with one mix or many: `python experiments/benchmarks/microbatches.py`.

A vision transformer of random weights learns one coefficient per weight row of K dense experts from
one batch of 16 images, whole and in 8 parts, with task vectors on the device, on the host and on
disk. Each row is one compiled step: its processor seconds, the smallest of three, and the bytes
that XLA says that it needs beside its arguments.
"""

import argparse
import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table
from transformers import ViTConfig

from adamerge_jax.cli.console import make_console
from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.granularities import constant, make_granularity
from adamerge_jax.data.batches import Batch
from adamerge_jax.learning.learner import Frozen, make_learner
from adamerge_jax.models import family_of
from adamerge_jax.objectives import Targets, TaskOutputs, entropy
from adamerge_jax.parameter_names import is_stacked
from adamerge_jax.task_vectors import Delta, DenseDelta
from adamerge_jax.task_vectors.offload.scratch import Scratch
from adamerge_jax.task_vectors.offload.streamed import DiskSource, HostSource, StreamedDelta

PLACES = ("device", "host", "disk")
PARTS = (1, 8)
IMAGES = 16


def placed(name: str, values: np.ndarray, place: str, scratch: Scratch) -> Delta:
    """Task vectors of a parameter in a place."""
    delta = DenseDelta(values)
    if place == "device":
        return jax.tree.map(jnp.asarray, delta)
    source = HostSource.put(delta) if place == "host" else DiskSource.put(delta, scratch)
    return StreamedDelta(source, jnp.arange(len(values)) if is_stacked(name) else None)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--places", nargs="+", choices=PLACES, default=PLACES)
    arguments = parser.parse_args()
    config = ViTConfig(
        hidden_size=arguments.hidden,
        intermediate_size=4 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    family, generator = family_of(config), np.random.default_rng(0)
    backbone, head = family.build_backbone(config), family.build_head(config)

    def random(shape: tuple[int, ...]) -> np.ndarray:
        return 0.02 * generator.standard_normal(shape, np.float32)

    base = {name: jnp.asarray(random(leaf.shape)) for name, leaf in backbone.shapes.items()}
    classes = {name: jnp.asarray(random(leaf.shape)) for name, leaf in head.shapes.items()}
    experts = arguments.experts
    values = {}
    for name, leaf in backbone.shapes.items():
        leading = leaf.shape[: is_stacked(name)]
        values[name] = random((*leading, experts, *leaf.shape[len(leading) :]))
    shapes = {name: leaf.shape for name, leaf in backbone.shapes.items()}
    granularity = make_granularity("row", {}, shapes)
    batch = Batch(
        {"pixel_values": random((IMAGES, 3, 32, 32))},
        np.full((1, IMAGES), 1 / IMAGES, np.float32),
        [Targets()],
    )

    def forward(parameters, heads, inputs):
        return [TaskOutputs(head(heads, backbone(parameters, inputs)))]

    table = Table(title=f"{sum(map(np.size, base.values())) / 1e6:.1f} M parameters, K = {experts}")
    for column in ("task vectors", "parts", "mixed", "seconds", "temporary MB"):
        table.add_column(column, justify="right")
    for place in arguments.places:
        scratch = Scratch()
        deltas = {name: placed(name, v, place, scratch) for name, v in values.items()}
        frozen = Frozen(base, deltas, classes)
        for parts in PARTS:
            for mixes_once in (False, True) if parts > 1 else (False,):
                learner = make_learner(
                    forward,
                    granularity,
                    CONSTRAINTS["free"],
                    entropy(),
                    optax.adam(1e-2),
                    microbatches=parts,
                    mixes_once=mixes_once,
                )
                state = learner.init(granularity.init(constant(shapes, experts, 0.3)))
                step = learner.step.lower(state, frozen, batch).compile()
                seconds = []
                for _ in range(3):
                    began = processor_seconds()
                    jax.block_until_ready(step(state, frozen, batch))
                    seconds.append(processor_seconds() - began)
                temporary = step.memory_analysis().temp_size_in_bytes / 1e6
                mixed = "a step" if mixes_once else "a part"
                table.add_row(place, str(parts), mixed, f"{min(seconds):.2f}", f"{temporary:.0f}")
    make_console().print(table)


def processor_seconds() -> float:
    """The processor seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
