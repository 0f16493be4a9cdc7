"""The record of a run: its time and memory, what it merged, and how alike the experts are.

All of it is in `run.json`, which grows phase by phase: an interrupted run has what was known then.
"""

import json
import resource
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from adamerge_jax.coefficients.granularity import Shapes
from adamerge_jax.devices import is_first_process
from adamerge_jax.files.json_object import read_object_if_there
from adamerge_jax.files.writing import write_whole
from adamerge_jax.parameter_names import is_stacked, layer_of, tensors_of
from adamerge_jax.runs.files import RECIPE_FILE, RECORD_FILE
from adamerge_jax.runs.invocation import describe_start
from adamerge_jax.task_vectors.delta import Delta
from adamerge_jax.task_vectors.similarity import cosines, inner_products

if TYPE_CHECKING:
    from adamerge_jax.checkpoints.matching import MatchedCheckpoint
    from adamerge_jax.data.batches import Calibration
    from adamerge_jax.data.examples import Examples


class RunRecord:
    """The record of one run, written to its folder as soon as that holds the recipe."""

    def __init__(self, folder: Path):
        """Goes on with the record that the folder has, so that a resumed run's times add up.

        Args:
            folder: The run folder; it is not made here.
        """
        self._folder = folder
        self._fields = describe_start() | read_object_if_there(folder / RECORD_FILE)

    @property
    def fields(self) -> Mapping[str, Any]:
        """The fields that the record has by now."""
        return self._fields

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
        """Adds fields, as JSON."""
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
            write_whole(self._folder / RECORD_FILE, f"{text}\n")


def peak_memory() -> dict[str, int]:
    """Returns peak memory in bytes: of the process, and of a device with memory of its own."""
    # Linux counts in kilobytes, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        peak["device"] = statistics["peak_bytes_in_use"]
    return peak


def peak_memory_of_arrays() -> int:
    """Returns peak memory in bytes where arrays lie: on the device, or in this process on a CPU."""
    peak = peak_memory()
    return peak.get("device", peak["process"])


def describe_machine() -> dict[str, Any]:
    """Returns the device and the versions of the packages that decide on a run's numbers."""
    devices = jax.devices()
    return {
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "versions": {name: version(name) for name in ("adamerge_jax", "jax", "jaxlib", "flax")},
    }


def describe_data(
    calibration: "Calibration", test: Mapping[str, "Examples"], *, language: bool
) -> dict[str, Any]:
    """Describes the examples of a run.

    Args:
        calibration: The calibration data.
        test: The test data by task.
        language: True for a language model.

    Returns:
        `examples`: the number of each task's examples to learn from, held out, and to test with.
        `agreement_with`: by task, what its held-out agreement compares the merge with (`expert`,
        `labels`, `tokens`, or null where there is nothing).
        `end_of_text`: of a language model, by task, `append` or `leave`.
    """
    agreement_with: dict[str, str | None] = {}
    for task, targets in calibration.targets.items():
        if language:
            agreement_with[task] = "tokens"
        elif targets.examples.labels is not None:
            agreement_with[task] = "labels"
        else:
            agreement_with[task] = None if targets.expert_logits is None else "expert"
    ends = {task: examples.end_of_text for task, examples in calibration.examples.items()}
    return {
        **({"end_of_text": ends} if language else {}),
        "examples": {
            task: {
                "learning": len(calibration.learning[task]),
                "held_out": len(calibration.held_out[task]),
                "test": len(test.get(task, ())),
            }
            for task in calibration.examples
        },
        "agreement_with": {task: agreement_with[task] for task in calibration.examples},
    }


def describe_tensors(
    base: "MatchedCheckpoint", kept: Collection[str], merged: Collection[str]
) -> dict[str, Any]:
    """Describes which tensors of the base are merged.

    Args:
        base: The base.
        kept: Names without `*` of the tensors that stay the base's.
        merged: Names of the merged tensors.

    Returns:
        `merged`: the number of merged tensors; `parameters`: the number of their entries; `kept`:
        names of those that the recipe keeps from the base; `unchanged`: names of those that no
        expert changes.
    """
    others = [name for name in base.names if name not in set(merged)]
    return {
        "merged": len(merged),
        "parameters": sum(int(np.prod(base.shape(name))) for name in merged),
        "kept": [name for name in base.names if name in kept],
        "unchanged": [name for name in others if name not in kept],
    }


def similarity(
    experts: Sequence[str], deltas: Mapping[str, Delta], shapes: Shapes, merged: Collection[str]
) -> dict[str, Any]:
    """Measures how alike the task vectors are, over all merged tensors and by layer.

    Args:
        experts: Names of the K experts.
        deltas: The deltas by parameter, after the interference steps.
        shapes: The shapes of these parameters.
        merged: Names of the merged tensors.

    Returns:
        `experts`: their names; `norms`: the norm of each task vector; `cosines`: `[K][K]`, null
        where a task vector is 0; `layers`: norms and cosines by layer. Small enough for JSON.
    """
    merged = dict.fromkeys(merged)
    total: dict[str, np.ndarray] = {}
    for name, delta in deltas.items():
        stacked = is_stacked(name)
        grams = inner_products(delta, shapes[name], len(experts), stacked=stacked)
        for tensor, gram in zip(
            tensors_of(name, shapes[name]), grams if stacked else [grams], strict=True
        ):
            if tensor in merged:
                layer = layer_of(tensor, merged)
                # Sums over millions of entries lose digits in float32.
                total[layer] = total.get(layer, 0) + gram.astype(np.float64)
    return {
        "experts": list(experts),
        **_norms_and_cosines(sum(total.values())),
        "layers": {layer: _norms_and_cosines(gram) for layer, gram in total.items()},
    }


def _norms_and_cosines(gram: np.ndarray) -> Mapping[str, Any]:
    """Returns lists for JSON, which has no NaN: where there is no angle there is null."""
    rows = [[None if np.isnan(c) else round(float(c), 6) for c in row] for row in cosines(gram)]
    return {"norms": np.sqrt(np.maximum(np.diag(gram), 0)).tolist(), "cosines": rows}
