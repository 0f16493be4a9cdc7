"""Folding every `model_type`: `python experiments/benchmarks/any_model.py [TYPE ...] --out FILE`.

A tiny random model of each type of the installed `transformers` is the base; two experts differ
from it in every floating tensor. `adamerge merge --method task_arithmetic` merges them, and every
tensor of the result is compared with the same merge in float64. A merge is equal where all tensors
are there, floating ones differ by at most 1e-6 of their largest value (a rounding of float32), and
others have the base's bytes.

Results go to a file of JSON lines, one a model; a run that was interrupted goes on after the last
one. The Markdown table and the sum are printed at the end.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from tiny_models import NotMadeError, model_types, tiny_model

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.pipeline.run import merge
from adamerge_jax.recipes.loading import parse_recipe

SCALE = 0.3
TOLERANCE = 1e-6


def main() -> None:
    """Merges a model of each type and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--out", type=Path, default=Path("any_model.jsonl"))
    arguments = parser.parse_args()
    results = {}
    if arguments.out.exists():
        for line in arguments.out.read_text().splitlines():
            result = json.loads(line)
            results[result["type"]] = result
    types = arguments.types or model_types()
    for number, model_type in enumerate(types, start=1):
        if model_type not in results:
            start = time.monotonic()
            result = {"type": model_type, **fold(model_type)}
            results[model_type] = result
            with arguments.out.open("a") as stream:
                stream.write(json.dumps(result) + "\n")
            seconds = time.monotonic() - start
            print(f"{number}/{len(types)} {model_type}: {in_words(result)} ({seconds:.1f} s)")
    print("\n".join(table([results[model_type] for model_type in types])))


def fold(model_type: str) -> dict[str, Any]:
    """Merges models of a type, and returns their tensors, and the reason if it did not work."""
    try:
        model = tiny_model(model_type)
    except NotMadeError as error:
        return {"made": False, "reason": str(error)}
    try:
        with tempfile.TemporaryDirectory() as folder:
            return {"made": True, **_merge(model, Path(folder))}
    except Exception as error:  # every failure is a row of the table
        return {"made": True, "equal": False, "reason": " ".join(str(error).split())[:160]}


def _merge(model: Any, folder: Path) -> dict[str, Any]:
    import torch

    model.save_pretrained(folder / "base")
    for seed, task in enumerate(("first", "second"), start=1):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(0.01 * torch.randn_like(parameter))
        model.save_pretrained(folder / task)
    tasks = {task: {"expert": str(folder / task)} for task in ("first", "second")}
    recipe = parse_recipe({"base": str(folder / "base"), "tasks": tasks, "export": {}})
    quiet = Console(quiet=True)
    options = {"coefficient": SCALE}
    out = folder / "out"
    merge(recipe, "task_arithmetic", options, root=folder, out=out, console=quiet)
    base, first, second = (Checkpoint.open(folder / name) for name in ("base", *tasks))
    merged = Checkpoint.open(out / "checkpoint")
    wrong = [name for name in base.tensors if not _is_equal(name, base, (first, second), merged)]
    reason = f"{wrong[0]} and {len(wrong) - 1} more differ" if wrong else ""
    return {"equal": not wrong, "tensors": len(base.tensors), "reason": reason}


def _is_equal(
    name: str, base: Checkpoint, experts: tuple[Checkpoint, Checkpoint], merged: Checkpoint
) -> bool:
    if name not in merged.tensors:
        return False
    before, after = base.read(name), merged.read(name)
    if before.dtype.kind in "iub":
        return np.array_equal(before, after)
    start = before.astype(np.float64)
    expected = start + SCALE * sum(expert.read(name) - start for expert in experts)
    largest = max(np.abs(expected).max(initial=0), 1.0)
    return bool(np.abs(after - expected).max(initial=0) <= TOLERANCE * largest)


def in_words(result: dict[str, Any]) -> str:
    """Returns the outcome of one model."""
    if not result["made"]:
        return f"not made: {result['reason']}"
    return "equal" if result["equal"] else f"no: {result['reason']}"


def table(results: list[dict[str, Any]]) -> list[str]:
    """Returns the lines of a Markdown table, with the sum."""
    made = [result for result in results if result["made"]]
    equal = sum(result["equal"] for result in made)
    return [
        "| model type | tensors | folds |",
        "| --- | --- | --- |",
        *(f"| {r['type']} | {r.get('tensors', '')} | {in_words(r)} |" for r in results),
        "",
        f"{equal} of {len(made)} that can be made fold; {len(results) - len(made)} are not made",
    ]


if __name__ == "__main__":
    main()
