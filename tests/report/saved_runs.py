"""A run folder as a run would have left it, written by hand."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from adamerge_jax.coefficients.file import Coefficients, Source
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.runs.evaluations import Evaluation, append_evaluation
from adamerge_jax.runs.front import Front, FrontPoint, SurfaceError

TASKS = ("cat", "dog")
TENSORS = (
    "vit.embeddings.cls_token",
    "vit.encoder.layer.0.output.dense.weight",
    "vit.encoder.layer.1.output.dense.weight",
    "vit.layernorm.weight",
)

COEFFICIENTS = Coefficients(
    values={
        name: np.array([0.1 * (at + 1), 1.5 - at], np.float32) for at, name in enumerate(TENSORS)
    },
    granularity="tensor",
    granularity_options={},
    interference=(),
    constraint="free",
    shapes={name: (8,) if "norm" in name or "token" in name else (8, 8) for name in TENSORS},
    base=Source("base", "org/base", None, "sha256:0"),
    experts=tuple(Source(task, f"experts/{task}", None, f"sha256:{task}") for task in TASKS),
    objective="entropy",
    seed=7,
    step=2,
)

RESULTS = {
    "base": (0.2, 0.3),
    "experts (one model each)": (0.9, 0.9),
    "task arithmetic (0.3)": (0.5, 0.5),
    "learned (tensor)": (0.8, 0.6),
}

RECORD = {
    "seconds": {"opening models and data": 1.5, "learning": 20.0},
    "device": "1 x cpu (cpu)",
    "versions": {"jax": "0.10.2"},
    "examples": {task: {"learning": 90, "held_out": 10, "test": 400} for task in TASKS},
    "agreement_with": {"cat": "expert", "dog": "labels"},
    "tensors": {
        "merged": 4,
        "parameters": 1234567,
        "kept": ["vit.encoder.layer.0.layernorm.bias", "vit.encoder.layer.1.layernorm.bias"],
        "unchanged": ["vit.pooler.dense.weight"],
    },
    "similarity": {
        "experts": list(TASKS),
        "norms": [1.25, 2.5],
        "cosines": [[1.0, 0.37], [0.37, 1.0]],
        "layers": {
            "vit.encoder.layer.0": {"norms": [1.0, 2.0], "cosines": [[1.0, -0.21], [-0.21, 1.0]]},
            "vit.layernorm": {"norms": [0.0, 1.0], "cosines": [[None, None], [None, 1.0]]},
        },
    },
    "peak_memory_bytes": {"process": 2_500_000_000},
}


EVALUATIONS = [
    Evaluation(1, "single", {"all": [0.3, 0.3]}, 0.55, {"cat": 0.5, "dog": 0.6}, 0.5),
    Evaluation(2, "single", {"all": [0.5, 0.5]}, 0.65, {"cat": 0.6, "dog": 0.7}, 0.5),
    Evaluation(3, "search", {"all": [0.6, 0.4]}, math.nan, {"cat": math.nan, "dog": 0.7}, 0.5),
    Evaluation(4, "search", {"all": [0.7, 0.4]}, 0.8, {"cat": 0.85, "dog": 0.75}, 0.5),
]


def front_point(number: int, cat: float, dog: float) -> FrontPoint:
    scores = {"cat": cat, "dog": dog}
    return FrontPoint(f"{number:02}.safetensors", {"cat": cat, "dog": 0.4}, scores, scores, scores)


FRONT = Front(
    score="accuracy",
    maximise=True,
    points=[front_point(1, 0.9, 0.5), front_point(2, 0.85, 0.75), front_point(3, 0.4, 0.8)],
    experts={"cat": 0.95, "dog": 0.9},
    singles=[(0.3, {"cat": 0.5, "dog": 0.6}), (0.5, {"cat": 0.6, "dog": 0.7})],
    others=[{"cat": 0.3, "dog": 0.3}, {"cat": 0.2, "dog": 0.7}],
    fits={task: SurfaceError(0.012, 0.034, 0.2) for task in TASKS},
)


def step(number: int, look: tuple[float, float] | None = None) -> dict[str, Any]:
    """A line of metrics.jsonl; `look` is the held-out objective and agreement of each task."""
    return {
        "step": number,
        "objective": None if number == 0 else dict.fromkeys(TASKS, 1 / number),
        "held_out": None if look is None else dict.fromkeys(TASKS, look[0]),
        "agreement": None if look is None else dict.fromkeys(TASKS, look[1]),
        "seconds": 0.25,
    }


STEPS = [step(0, (2.0, 0.25)), step(1), step(2, (1.0, 0.75)), step(3), step(4, (1.1, 0.5))]


def write_run(folder: Path, *parts: str, **fields: Any) -> Path:
    """Writes the named parts of a run: `coefficients`, `metrics`, `results`, `record`,
    `evaluations`, `front`."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = {
        task: {"expert": f"experts/{task}", "calibration": f"data/{task}.npz"} for task in TASKS
    }
    for own in tasks.values():
        own["test"] = {"path": "data/test.npz", "label": "label"}
    recipe = parse_recipe(
        {"name": "pets", "base": "org/base", "tasks": tasks, "learning": {"steps": 4}} | fields
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    if "coefficients" in parts:
        COEFFICIENTS.save(folder / "coefficients.safetensors")
    if "metrics" in parts:
        write_steps(folder, STEPS)
    if "results" in parts:
        rows = [
            {"method": method, "metric": "accuracy", "tasks": dict(zip(TASKS, own, strict=True))}
            for method, own in RESULTS.items()
        ]
        (folder / "results.json").write_text(json.dumps({"rows": rows}))
    for evaluation in EVALUATIONS if "evaluations" in parts else ():
        append_evaluation(folder / "evaluations.jsonl", evaluation)
    if "front" in parts:
        FRONT.write(folder / "front.json")
    if "record" in parts:
        (folder / "run.json").write_text(json.dumps(RECORD))
    return folder


def write_steps(folder: Path, steps: list[dict[str, Any]]) -> None:
    lines = [json.dumps(own) for own in steps]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


ALL = ("coefficients", "metrics", "results", "record")
