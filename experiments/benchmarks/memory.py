"""Peak memory against the number of experts: `python experiments/benchmarks/memory.py`.

A vision transformer in float32 learns one coefficient per tensor of 1, 2, 4, 8 and 16 experts, with
the task vectors on the device, in the host's memory and on disk. The whole way is measured: experts
are read from their checkpoints, the step is compiled and run. The batch is 16 images however many
experts there are, so that what grows is what experts take. Sixteen experts of the base size and
their task vectors take 11 GB of disk, of the large one 40.

Each row is a process of its own. `arguments` are the arrays that the compiled step is given, on the
device and in the host's memory (JAX's memory kinds); `temporary` is what XLA says that the step
needs beside them; `peak` is the largest memory in use on the device, where it says so, and the
largest resident memory of the process. On the CPU both memories are the process's. The last row of
a block compares 16 experts with 2: arguments and temporary on the device, and the peaks.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from processes import in_own_process
from rich.table import Table
from safetensors.numpy import save_file
from transformers import ViTConfig

from adamerge_jax.cli.console import make_console
from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.granularities import constant, make_granularity
from adamerge_jax.learning import learner as learning
from adamerge_jax.learning.forward import forward_with_heads
from adamerge_jax.learning.optimizer import build_optimizer
from adamerge_jax.models import family_of
from adamerge_jax.parameter_names import is_stacked, unstack
from adamerge_jax.pipeline.learn import prepare
from adamerge_jax.pipeline.workspace import open_workspace
from adamerge_jax.recipes.build import build, build_objectives
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.runs.record import peak_memory

PLACES = ("device", "host", "disk")
EXPERTS = (1, 2, 4, 8, 16)
IMAGES = 16
STEPS = 3
CLASSES = 10

SIZES = {
    "small": dict(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8
    ),
    "base": dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    ),
    "large": dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
    ),
}
"""25 M parameters, then ViT-B's and ViT-L's sizes: 85 and 302 M."""

IMAGE_SIZE = 32


def model(size: str) -> ViTConfig:
    """The vision transformer of a size."""
    return ViTConfig(**SIZES[size], image_size=IMAGE_SIZE, patch_size=8, num_labels=CLASSES)


def tensors(parameters: dict[str, Any], generator: np.random.Generator) -> Iterator[tuple]:
    """Random tensors by their names in a checkpoint."""
    for name, leaf in parameters.items():
        names = unstack(name, leaf.shape[0]) if is_stacked(name) else [name]
        shape = leaf.shape[1:] if is_stacked(name) else leaf.shape
        for each in names:
            yield each, 0.02 * generator.standard_normal(shape, np.float32)


def write_checkpoints(folder: Path, config: ViTConfig, experts: int) -> None:
    """A base, an expert for each task, and images."""
    family = family_of(config)
    backbone, head = family.build_backbone(config).shapes, family.build_head(config).shapes
    for position in range(experts + 1):
        own = folder / (f"expert{position}" if position else "base")
        own.mkdir()
        config.architectures = ["ViTForImageClassification"]
        config.save_pretrained(own)
        parameters = backbone | head if position else backbone
        generator = np.random.default_rng(position)
        save_file(
            dict(tensors(parameters, generator)),
            own / "model.safetensors",
            metadata={"format": "pt"},
        )
    shape = (2 * IMAGES, 3, IMAGE_SIZE, IMAGE_SIZE)
    pixels = np.random.default_rng(0).standard_normal(shape, np.float32)
    np.savez(folder / "images.npz", pixel_values=pixels)


def measure(folder: Path, place: str, experts: int) -> dict[str, float]:
    """Bytes that learning takes with so many experts."""
    task = {"calibration": str(folder / "images.npz")}
    recipe = parse_recipe(
        {
            "preset": "adamerging",
            "base": str(folder / "base"),
            "tasks": {
                f"task{k}": task | {"expert": str(folder / f"expert{k}")}
                for k in range(1, experts + 1)
            },
            "coefficients": {"granularity": "tensor"},
            "task_vectors": {"memory": place},
            "learning": {"batch_size": IMAGES // experts, "rematerialize": "layer"},
        }
    )
    workspace = open_workspace(recipe, folder)
    inputs = prepare(build(recipe, workspace.models), workspace)
    workspace = inputs.workspace
    granularity = make_granularity("tensor", {}, inputs.shapes)
    heads = list(workspace.head_networks.values())
    learner = learning.make_learner(
        forward_with_heads(workspace.backbone, heads),
        granularity,
        CONSTRAINTS["clip"],
        list(build_objectives(recipe.objectives, recipe.tasks).values()),
        build_optimizer(recipe.learning.optimizer, STEPS),
    )
    state = learner.init(granularity.init(constant(inputs.shapes, experts, 0.3)))
    deltas = {name: granularity.prepare(name, delta) for name, delta in inputs.deltas.items()}
    frozen = learning.Frozen(inputs.base, deltas, list(workspace.heads.values()))
    batches = inputs.calibration.batches()
    arguments = (state, frozen, next(batches))
    step = learner.step.lower(*arguments).compile()
    on_host = sum(
        leaf.nbytes
        for leaf in jax.tree.leaves(frozen)
        if leaf.sharding.memory_kind == "pinned_host"
    )
    everything = sum(leaf.nbytes for leaf in jax.tree.leaves(arguments))
    for _ in range(STEPS):
        state, per_task = step(state, frozen, arguments[-1])
    jax.block_until_ready(per_task)
    peak = peak_memory()
    return {
        "device": everything - on_host,
        "host": on_host,
        "temporary": step.memory_analysis().temp_size_in_bytes,
        "used": peak.get("device", 0),
        "resident": peak["process"],
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=PLACES)
    parser.add_argument("--experts", nargs="+", type=int, choices=EXPERTS, default=EXPERTS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        place, experts, folder = arguments.measure
        print(json.dumps(measure(Path(folder), place, int(experts))))
        return
    config = model(arguments.size)
    shapes = family_of(config).build_backbone(config).shapes
    parameters = sum(int(np.prod(leaf.shape)) for leaf in shapes.values())
    device = jax.devices()[0].device_kind
    table = Table(title=f"MB; {parameters / 1e6:.1f} M parameters, float32; on {device}")
    columns = ("task vectors", "experts", "arguments: device", "host", "temporary")
    for column in (*columns, "peak: device", "process"):
        table.add_column(column, justify="left" if column == columns[0] else "right")
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoints(Path(folder), config, max(arguments.experts))
        for place in arguments.places:
            found = {}
            for experts in arguments.experts:
                own = in_own_process(__file__, "--measure", place, experts, folder)
                found[experts] = own
                values = (own[key] / 1e6 for key in ("device", "host", "temporary"))
                used = f"{own['used'] / 1e6:.0f}" if own["used"] else "-"
                resident = f"{own['resident'] / 1e6:.0f}"
                row = (place, str(experts), *map("{:.0f}".format, values), used, resident)
                table.add_row(*row)
                print(*row, file=sys.stderr)
            if not {2, 16} <= found.keys():
                continue
            many, two = found[16], found[2]
            compiled = (many["device"] + many["temporary"]) / (two["device"] + two["temporary"])
            used = f"{many['used'] / two['used']:.2f} times" if two["used"] else ""
            resident = f"{many['resident'] / two['resident']:.2f} times"
            table.add_row(
                "", "16 over 2", f"{compiled:.2f} times", "", "", used, resident, end_section=True
            )
    make_console().print(table)


if __name__ == "__main__":
    main()
