"""Peak memory of a pool of experts: `python experiments/benchmarks/pool.py`.

Writes a small vision transformer and 30 fully fine-tuned experts of it with random weights (43 MB
each), merges 2 of them and all 30 with the preset `fw-merging`, each in a process of its own, and
prints the largest resident memory of each process and the ratio of 30 to 2. A step has 60 images
however many experts there are. For comparison all 30 are also merged with task vectors in memory.
Takes about 3 GB of disk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
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


def merge(folder: Path, experts: int, memory: str) -> tuple[int, float]:
    """Merges so many experts in a process of its own: its peak memory in bytes, and seconds."""
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
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the merge of {name} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return usage.ru_maxrss * unit, time.perf_counter() - began


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
    for column in ("experts", "task vectors", "process MB", "seconds"):
        table.add_column(column, justify="right")
    peaks = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write_pool(folder, pool)
        for experts, memory in ((2, "disk"), (pool, "disk"), (pool, "device")):
            peak, seconds = merge(folder, experts, memory)
            peaks[experts, memory] = peak
            table.add_row(str(experts), memory, f"{peak / 1e6:.0f}", f"{seconds:.0f}")
            print(json.dumps([experts, memory, peak, seconds]), file=sys.stderr)
    ratio = peaks[pool, "disk"] / peaks[2, "disk"]
    table.add_row(f"{pool} over 2", "disk", f"{ratio:.2f} times", "")
    make_console().print(table)


if __name__ == "__main__":
    main()
