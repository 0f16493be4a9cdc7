"""Folding a merge: `python experiments/benchmarks/fold.py [--mergekit BIN/mergekit-yaml]`.

A base and 4 experts, each a Llama of 100 M parameters in several files, are written to a temporary
folder. Then, each in a process of its own,

- (a) the experts' files are copied with shutil,
- (b) `adamerge fold` writes their merge with one coefficient per tensor as a Hugging Face
  checkpoint; (b') as an Orbax checkpoint too, as it does unless told otherwise,
- (c) mergekit does the same linear merge, where it is given.

Before each, all files are on the disk and dropped from the page cache, and each is timed until
what it wrote is on the disk too, as a fold always waits for that; (a') does not wait. Seconds are
those of the work, without the start of Python and its imports. Memory is the largest resident size
of the process (of Linux), that over what it was before the work, and the part that this is of what
is allowed: 1.5 times a file of the checkpoint for the base and for every expert.
"""

import argparse
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from adamerge_jax.checkpoints.config_file import fields_of
from adamerge_jax.checkpoints.dtypes import DTYPES
from adamerge_jax.checkpoints.huggingface_export import write_checkpoint
from adamerge_jax.cli.console import make_console
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.coefficients.granularities import constant, make_granularity
from adamerge_jax.models import family_of
from adamerge_jax.parameter_names import tensor_shape, tensors_of
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.pipeline.run_fold import fold_file
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.recipes.schema import Recipe

EXPERTS = [f"expert{number}" for number in range(1, 5)]
COEFFICIENT = 0.3

CONFIG = LlamaConfig(
    vocab_size=20000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=12,
    tie_word_embeddings=True,
    architectures=["LlamaForCausalLM"],
)
SHARD_MEGABYTES = {"bfloat16": 50, "float32": 100}
"""Of the experts' files and of the merge's: five files each."""

MERGEKIT = """
import json, os, pathlib, sys, time, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

{resident}
config, out, shard = sys.argv[1:]
merge = MergeConfiguration.model_validate(yaml.safe_load(open(config)))
floor, started = resident("VmRSS"), time.perf_counter()
run_merge(merge, out, MergeOptions(out_shard_size=int(shard), copy_tokenizer=False, quiet=True))
for file in pathlib.Path(out).rglob("*"):
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
seconds = time.perf_counter() - started
print(json.dumps({{"seconds": seconds, "floor": floor, "peak": resident("VmHWM")}}))
"""
"""Run by the interpreter beside `mergekit-yaml`: the merge that this would run, timed."""


class Result(NamedTuple):
    """What one variant took: seconds, and resident bytes before and at the most."""

    seconds: float
    floor: int
    peak: int


def write_models(root: Path, dtype: str) -> None:
    """Writes the base and the experts, of random weights."""
    shapes = {n: leaf.shape for n, leaf in family_of(CONFIG).build_backbone(CONFIG).shapes.items()}
    for seed, model in enumerate(["base", *EXPERTS]):
        generator = np.random.default_rng(seed)
        size = SHARD_MEGABYTES[dtype] * 10**6
        with write_checkpoint(root / model, max_shard_bytes=size) as writer:
            for name, shape in shapes.items():
                for tensor in tensors_of(name, shape):
                    values = generator.standard_normal(tensor_shape(name, shape), np.float32)
                    writer.add(tensor, (0.02 * values).astype(DTYPES[dtype]))
            writer.write_config(fields_of(CONFIG))


def recipe(root: Path, dtype: str, orbax: bool = False) -> Recipe:
    """The recipe of the merge; a fold does not look at its data."""
    return parse_recipe(
        {
            "base": str(root / "base"),
            "tasks": {t: {"expert": str(root / t), "calibration": "unused"} for t in EXPERTS},
            "export": {"shard_megabytes": SHARD_MEGABYTES[dtype], "orbax": orbax},
        }
    )


def write_coefficients(root: Path, dtype: str) -> None:
    """Writes coefficients per tensor, all of them the same, and the mergekit config for them."""
    models = open_models(recipe(root, dtype), root)
    shapes = {name: models.base.shape(name) for name in models.base.names}
    start = make_granularity("tensor", {}, shapes).init(constant(shapes, len(EXPERTS), COEFFICIENT))
    base, *experts = models.sources
    Coefficients(
        values={group: np.asarray(values[0]) for group, values in start.items()},
        granularity="tensor",
        granularity_options={},
        interference=(),
        constraint="free",
        shapes=shapes,
        base=base,
        experts=tuple(experts),
        objective="none",
        seed=0,
        step=0,
    ).save(root / "coefficients.safetensors")
    weights = {"base": 1 - COEFFICIENT * len(EXPERTS)} | dict.fromkeys(EXPERTS, COEFFICIENT)
    config = {
        "merge_method": "linear",
        "models": [
            {"model": str(root / model), "parameters": {"weight": weight}}
            for model, weight in weights.items()
        ],
        "parameters": {"normalize": False},
        "dtype": "float32",
        "out_dtype": dtype,
    }
    (root / "mergekit.yaml").write_text(yaml.safe_dump(config))


def weight_files(root: Path, models: Iterable[str]) -> list[Path]:
    """The files of the weights of some models."""
    return [file for model in models for file in sorted((root / model).glob("*.safetensors"))]


def drop_from_page_cache(root: Path) -> None:
    """Has everything on the disk and nothing of the models in memory."""
    os.sync()
    for file in weight_files(root, ["base", *EXPERTS]):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_experts(root: Path, out: Path, flush: bool) -> None:
    """(a): what any tool must do at least to make files of the experts' size."""
    for file in weight_files(root, EXPERTS):
        target = out / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        if flush:
            with target.open("rb") as stream:
                os.fsync(stream.fileno())


def resident(field: str) -> int:
    """Bytes of this process in memory: `VmRSS` now, from which `VmHWM`, the peak, starts anew."""
    if field == "VmRSS":
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith(field))


def measure(work: Callable[[], object]) -> Result:
    """Time and memory of some work in this process."""
    floor, started = resident("VmRSS"), time.perf_counter()
    work()
    return Result(time.perf_counter() - started, floor, resident("VmHWM"))


def run_variant(variant: str, root: Path, dtype: str, out: Path) -> Result:
    """Runs one of our own variants in this process."""
    if variant.startswith("fold"):
        quiet, own = Console(quiet=True), recipe(root, dtype, orbax=variant == "fold-orbax")
        file = root / "coefficients.safetensors"
        return measure(lambda: fold_file(file, own, root=root, out=out, console=quiet))
    return measure(lambda: copy_experts(root, out, flush=variant == "copy"))


def compare(dtype: str, root: Path, mergekit: Path | None, console: Console) -> None:
    """Runs all variants on one set of models and prints their table."""
    write_models(root, dtype)
    write_coefficients(root, dtype)
    read = sum(file.stat().st_size for file in weight_files(root, EXPERTS))
    largest = max(file.stat().st_size for file in weight_files(root, EXPERTS))
    allowed = 1.5 * largest * (len(EXPERTS) + 1)
    out = root / "out"
    ours = [sys.executable, __file__, "--root", str(root), "--dtype", dtype, "--variant"]
    commands = {
        "a: copy the experts' files": [*ours, "copy"],
        "a': the same, left to the page cache": [*ours, "copy-unflushed"],
        "b: adamerge fold": [*ours, "fold"],
        "b': the same, and Orbax": [*ours, "fold-orbax"],
    }
    if mergekit:
        config, shard = str(root / "mergekit.yaml"), str(SHARD_MEGABYTES[dtype] * 10**6)
        python = str(mergekit.absolute().parent / "python")
        script = MERGEKIT.format(resident=inspect.getsource(resident))
        commands["c: mergekit"] = [python, "-c", script, config, str(out), shard]
    table = Table(
        title=f"{dtype}: {len(EXPERTS)} experts of {read / len(EXPERTS) / 1e6:.0f} MB in files of "
        f"up to {largest / 1e6:.0f} MB; {os.cpu_count()} CPU cores"
    )
    for column in ("", "s", "GB/s of experts", "speed of a", "peak MB", "over imports", "allowed"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    first = None
    for name, command in commands.items():
        drop_from_page_cache(root)
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result = Result(**json.loads(done.stdout.splitlines()[-1]))
        first = first or result
        table.add_row(
            name,
            f"{result.seconds:.2f}",
            f"{read / result.seconds / 1e9:.2f}",
            f"{first.seconds / result.seconds:.2f}",
            f"{result.peak / 1e6:.0f}",
            f"{(result.peak - result.floor) / 1e6:.0f}",
            f"{(result.peak - result.floor) / allowed:.2f} of {allowed / 1e6:.0f} MB",
        )
        shutil.rmtree(out)
    console.print(table)
    if not mergekit:
        console.print("c: mergekit was left out; give --mergekit BIN/mergekit-yaml")


def main() -> None:
    """Prints one table per dtype."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml in an environment of its own")
    parser.add_argument("--dtype", choices=list(SHARD_MEGABYTES), help="one dtype only")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        root = arguments.root
        result = run_variant(arguments.variant, root, arguments.dtype, root / "out")
        print(json.dumps(result._asdict()))
        return
    console = make_console(width=140)
    for dtype in [arguments.dtype] if arguments.dtype else SHARD_MEGABYTES:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            compare(dtype, Path(folder), arguments.mergekit, console)


if __name__ == "__main__":
    main()
