"""Peak memory of a pool of experts: `python experiments/benchmarks/pool.py`.

Writes a small vision transformer and 30 fully fine-tuned experts of it with random weights (43 MB
each), merges 2 of them and all 30 with the preset `fw-merging`, each in a process of its own, and
prints the largest memory of each process and the ratio of 30 to 2. Anonymous memory is the
process's own; pages of files, such as libraries and task vectors on disk, can be given up at any
time. A step has 60 images however many experts there are, but each expert brings 80 images, a
megabyte. Programs are compiled anew. For comparison all 30 are also merged with task vectors in
memory. Takes about 3 GB of disk. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import yaml
from memory import IMAGE_SIZE, tensors
from rich.table import Table
from safetensors.numpy import save_file
from transformers import ViTConfig

from adamerge_jax.cli.console import make_console
from adamerge_jax.models import family_of

EXPERTS = 30
IMAGES = 60
STEPS = 2
CONFIG = dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6)


def write_pool(folder: Path, experts: int) -> None:
    """Writes the base, the experts and images; an expert is the base with small changes."""
    config = ViTConfig(**CONFIG, image_size=IMAGE_SIZE, patch_size=8, num_labels=10)
    config.architectures = ["ViTForImageClassification"]
    family = family_of(config)
    backbone, head = family.build_backbone(config).shapes, family.build_head(config).shapes
    base = dict(tensors(backbone, np.random.default_rng(0)))
    for position in range(experts + 1):
        model = folder / (f"expert{position}" if position else "base")
        model.mkdir()
        config.save_pretrained(model)
        arrays = base
        if position:
            generator = np.random.default_rng(position)
            changes = dict(tensors(backbone, generator))
            arrays = {name: array + 0.1 * changes[name] for name, array in base.items()}
            arrays |= dict(tensors(head, generator))
        save_file(arrays, model / "model.safetensors", metadata={"format": "pt"})
    pixels = np.random.default_rng(0).standard_normal((80, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    np.savez(folder / "images.npz", pixel_values=pixels)


class Peak(NamedTuple):
    """The largest memory of a process, in bytes, and its seconds."""

    anonymous: int
    of_files: int
    seconds: float


def merge(folder: Path, experts: int, memory: str) -> Peak:
    """Merges so many experts in a process of its own, whose memory is read 50 times a second."""
    name = f"{experts}-{memory}"
    recipe = {
        "preset": "fw-merging",
        "base": "base",
        "tasks": {
            f"task{k}": {"expert": f"expert{k}", "calibration": "images.npz"}
            for k in range(1, experts + 1)
        },
        "task_vectors": {"memory": memory},
        "learning": {
            "steps": STEPS,
            "batch_size": max(1, IMAGES // experts),
            "evaluate_every": STEPS,
            "rematerialize": "layer",
        },
        "export": {"orbax": False},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    run = "from adamerge_jax.cli.main import main; main()"
    out = folder / f"run-{name}"
    command = [sys.executable, "-c", run, "learn", str(file), "--out", str(out)]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": ""}
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    anonymous, of_files = 0, 0
    with suppress(psutil.NoSuchProcess):
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            used = watched.memory_info()
            anonymous = max(anonymous, used.rss - used.shared)
            of_files = max(of_files, used.shared)
            time.sleep(0.02)
    if process.wait():
        raise SystemExit(f"the merge of {name} failed")
    return Peak(anonymous, of_files, time.perf_counter() - began)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=EXPERTS, help="size of the pool")
    parser.add_argument("--folder", type=Path, help="for the models; by default temporary")
    arguments = parser.parse_args()
    pool = arguments.experts
    table = Table(title="peak memory of a merge")
    for column in ("experts", "task vectors", "anonymous MB", "of files MB", "seconds"):
        table.add_column(column, justify="right")
    peaks = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write_pool(folder, pool)
        for experts, memory in ((2, "disk"), (pool, "disk"), (pool, "device")):
            peak = peaks[experts, memory] = merge(folder, experts, memory)
            megabytes = [f"{size / 1e6:.0f}" for size in (peak.anonymous, peak.of_files)]
            table.add_row(str(experts), memory, *megabytes, f"{peak.seconds:.0f}")
            print(json.dumps([experts, memory, *peak]), file=sys.stderr)
    ratio = peaks[pool, "disk"].anonymous / peaks[2, "disk"].anonymous
    table.add_row(f"{pool} over 2", "disk", f"{ratio:.2f} times", "", "")
    make_console().print(table)


if __name__ == "__main__":
    main()
