"""Compiling over the number of experts: `python experiments/benchmarks/experts.py`.

The step that the preset `recommended` compiles, for experts of a small vision transformer: one
coefficient for each row of a weight, alignment of logits on all tasks' examples, learned heads.
Batches share 64 images whatever the number of experts. Each number in a process of its own.
"""

import argparse
import json
import resource
import time
from typing import TYPE_CHECKING, Any

from processes import in_own_process
from rich.table import Table

from adamerge_jax.cli.console import make_console

if TYPE_CHECKING:
    from adamerge_jax.devices import Devices

IMAGES = 64


def learning_step(experts: int, size: int, devices: "Devices | None" = None) -> tuple[Any, ...]:
    """Returns a learner, and the state, the frozen arrays and the batch of a step.

    Args:
        experts: Their number.
        size: The images of each.
        devices: The devices; None for one.
    """
    import numpy as np
    import optax
    import step as sizes

    from adamerge_jax.coefficients.constraints import CONSTRAINTS
    from adamerge_jax.coefficients.granularities import constant, row
    from adamerge_jax.data.batches import Batch
    from adamerge_jax.devices import ONE_DEVICE
    from adamerge_jax.heads.learned import HeadLearning
    from adamerge_jax.learning.forward import forward_with_heads
    from adamerge_jax.learning.learner import Frozen, make_learner
    from adamerge_jax.models import family_of
    from adamerge_jax.objectives import Targets, logit_alignment
    from adamerge_jax.objectives.targets import CrossTaskTargets
    from adamerge_jax.stacks import Stacked
    from adamerge_jax.task_vectors import DenseDelta

    devices = devices or ONE_DEVICE
    config, _ = sizes.config_of("small")
    family = family_of(config)
    backbone, head = family.build_backbone(config), family.build_head(config)
    generator = np.random.default_rng(0)
    base = {
        name: devices.parameter(name, array)
        for name, array in sizes.arrays(backbone.shapes, generator).items()
    }
    heads = [sizes.arrays(head.shapes, generator) for _ in range(experts)]
    heads = devices.replicate(Stacked.of(heads))
    deltas = {
        name: devices.delta(name, DenseDelta(array))
        for name, array in sizes.arrays(backbone.shapes, generator, (experts,)).items()
    }
    shapes = {name: leaf.shape for name, leaf in backbone.shapes.items()}
    granularity = row(shapes)
    learner = make_learner(
        forward_with_heads(backbone, [head] * experts, cross_task=True),
        granularity,
        CONSTRAINTS["free"],
        logit_alignment(cross_task=0.6),
        optax.adam(1e-3),
        devices=devices,
        head_learning=HeadLearning(tuple(head.shapes), optax.adam(1e-3)),
    )
    state = learner.init(granularity.init(constant(shapes, experts, 0.3)), heads)
    state = devices.replicate(state)
    pixels = generator.standard_normal(
        (experts * size, config.num_channels, config.image_size, config.image_size), np.float32
    )

    def logits(*shape: int) -> np.ndarray:
        return generator.standard_normal((*shape, sizes.CLASSES), np.float32)

    targets = [
        Targets(
            expert_logits=logits(size),
            cross_task=CrossTaskTargets(
                logits(size, experts - 1), np.ones((size, experts - 1), np.float32)
            ),
        )
        for _ in range(experts)
    ]
    weights = np.full((experts, size), 1 / size, np.float32)
    batch = Batch({"pixel_values": pixels}, weights, Stacked.of(targets)).spread(devices)
    return learner, state, Frozen(base, deltas, heads), batch


def measure(experts: int) -> dict[str, float]:
    """Processor seconds to trace and to compile, seconds of a step, bytes of its arrays."""
    import jax

    learner, state, frozen, batch = learning_step(experts, IMAGES // experts)
    started = time.process_time()
    lowered = learner.step.lower(state, frozen, batch)
    traced = time.process_time()
    compiled = lowered.compile()
    ended = time.process_time()
    jax.block_until_ready(compiled(state, frozen, batch))
    again = time.perf_counter()
    for _ in range(5):
        jax.block_until_ready(compiled(state, frozen, batch))
    step_seconds = (time.perf_counter() - again) / 5
    return {
        "trace": traced - started,
        "compile": ended - traced,
        "step": step_seconds,
        "bytes": compiled.memory_analysis().temp_size_in_bytes,
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    """Starts a process for every number of experts, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 8, 32, 64])
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure)))
        return
    table = Table(title=f"A step of {IMAGES} images by the number of experts")
    for column in ("experts", "trace (s)", "compile (s)", "step (ms)", "its arrays (MB)"):
        table.add_column(column, justify="right")
    table.add_column("peak of the process (MB)", justify="right")
    for experts in arguments.experts:
        result = in_own_process(__file__, "--measure", experts)
        table.add_row(
            str(experts),
            f"{result['trace']:.1f}",
            f"{result['compile']:.1f}",
            f"{1000 * result['step']:.0f}",
            f"{result['bytes'] / 1e6:.0f}",
            f"{result['process'] / 1e6:.0f}",
        )
    make_console().print(table)


if __name__ == "__main__":
    main()
