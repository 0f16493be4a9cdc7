"""What a run leaves of itself beside its results: what it took, what it merged, how alike it was.

All of it is in `run.json`, which grows phase by phase: an interrupted run has what was known then.
"""

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adamerge_jax.devices import is_first_process
from adamerge_jax.parameter_names import is_stacked, layer_of
from adamerge_jax.pipeline.learn import Problem
from adamerge_jax.runs.folder import RECIPE_FILE, RECORD_FILE, write_whole
from adamerge_jax.task_vectors.similarity import cosines, inner_products


class RunRecord:
    """The record of one run, written to its folder as soon as that holds the recipe."""

    def __init__(self, folder: Path):
        """Goes on with the record that the folder has, so that a resumed run's times add up.

        Args:
            folder: The run folder; it is not made here.
        """
        self._folder = folder
        file = folder / RECORD_FILE
        self._fields: dict[str, Any] = (
            json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures the wall-clock time of a block, also of one that ends with an exception."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = self._fields.setdefault("seconds", {})
            elapsed = time.perf_counter() - started
            seconds[name] = round(seconds.get(name, 0.0) + elapsed, 3)
            self.write()

    def add(self, **fields: Any) -> None:
        """Adds what is known from now on, as JSON."""
        self._fields |= fields
        self.write()

    def write(self) -> None:
        """Writes the file, with the peak memory up to now; nothing before the run has its folder.

        A folder that is there may be somebody's empty one, and the run may yet be refused. Of
        several processes the first one writes.
        """
        if (self._folder / RECIPE_FILE).is_file() and is_first_process():
            self._fields["peak_memory_bytes"] = peak_memory()
            text = json.dumps(self._fields, indent=2, ensure_ascii=False)
            # A run that is killed meanwhile is to find a whole record when it goes on.
            write_whole(self._folder / RECORD_FILE, f"{text}\n".encode())


def peak_memory() -> dict[str, int]:
    """Peak memory in bytes: of this process, and of the device where it has memory of its own."""
    # Linux counts in kilobytes, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        peak["device"] = statistics["peak_bytes_in_use"]
    return peak


def peak_memory_of_arrays() -> int:
    """Peak memory in bytes where arrays lie: on the device, or in this process on the CPU."""
    peak = peak_memory()
    return peak.get("device", peak["process"])


def describe_machine() -> dict[str, Any]:
    """Where a run takes place: the device, and the versions of what decides on its numbers."""
    devices = jax.devices()
    return {
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "versions": {name: version(name) for name in ("adamerge_jax", "jax", "jaxlib", "flax")},
    }


def describe_problem(problem: Problem) -> dict[str, Any]:
    """What a run merges and learns from.

    Returns:
        By name: `examples` of each task to learn from, held out and to test with; `agreement_with`,
        what each task's held-out agreement compares the merge with (`expert`, `labels`, `tokens`,
        or null where there is nothing); `tensors`, how many are merged with how many parameters,
        which the recipe keeps from the base, and which no expert changes; `similarity` of the task
        vectors, as `similarity` gives it.
    """
    workspace, calibration = problem.workspace, problem.calibration
    models = workspace.models
    unmerged = set(models.base.names) - set(problem.mixed)
    return {
        "examples": {
            task: {
                "learning": len(calibration.learning[task]),
                "held_out": len(calibration.held_out[task]),
                "test": len(workspace.data.test.get(task, ())),
            }
            for task in calibration.examples
        },
        "agreement_with": {task: _agreement_with(problem, task) for task in calibration.examples},
        "tensors": {
            "merged": len(problem.mixed),
            "parameters": sum(int(np.prod(models.base.shape(name))) for name in problem.mixed),
            "kept": [name for name in models.base.names if name in models.kept],
            "unchanged": [n for n in models.base.names if n in unmerged - models.kept],
        },
        "similarity": similarity(problem),
    }


def similarity(problem: Problem) -> dict[str, Any]:
    """How alike the task vectors are, after the interference steps, over all and by layer.

    Returns:
        `experts`: their names; `norms`: the norm of each task vector; `cosines`: `[K][K]`, null
        where a task vector is 0; `layers`: norms and cosines by layer. Small enough for JSON.
    """
    mixed = set(problem.mixed)
    models = problem.workspace.models
    total: dict[str, np.ndarray] = {}
    for name, delta in problem.deltas.items():
        stacked = is_stacked(name)
        grams = inner_products(delta, problem.shapes[name], problem.experts, stacked=stacked)
        for tensor, gram in zip(models.tensors(name), grams if stacked else [grams], strict=True):
            if tensor in mixed:
                layer = layer_of(tensor, problem.mixed)
                # Sums over millions of entries lose digits in float32.
                total[layer] = total.get(layer, 0) + gram.astype(np.float64)
    return {
        "experts": list(models.experts),
        **_norms_and_cosines(sum(total.values())),
        "layers": {layer: _norms_and_cosines(gram) for layer, gram in total.items()},
    }


def _norms_and_cosines(gram: np.ndarray) -> Mapping[str, Any]:
    """As lists for JSON, which has no NaN: where there is no angle there is null."""
    rows = [[None if np.isnan(c) else round(float(c), 6) for c in row] for row in cosines(gram)]
    return {"norms": np.sqrt(np.maximum(np.diag(gram), 0)).tolist(), "cosines": rows}


def _agreement_with(problem: Problem, task: str) -> str | None:
    """What the held-out agreement of a task compares the merge's predictions with."""
    targets = problem.calibration.targets[task]
    if problem.workspace.models.family.language:
        return "tokens"
    if targets.examples.labels is not None:
        return "labels"
    return None if targets.expert_logits is None else "expert"
