"""The run folder: what its files are called, and reading what a run has left, finished or not."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.errors import InputError
from adamerge_jax.pipeline.evaluate import Row

RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
RECORD_FILE = "run.json"
RESULTS_FILE = "results.json"
COEFFICIENTS_FILE = "coefficients.safetensors"
HEAT_MAP_FILE = "coefficients.png"
PAGE_FILE = "report.html"

_FILLED_IN = (
    "base.path",
    "preset",
    "keep_from_base",
    "coefficients.granularity",
    "coefficients.constraint",
    "learning.steps",
)
"""Fields that the recipe of a run has whatever its user wrote, and that are read from it."""

ByTask = dict[str, float | None]


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file, or writes it anew, such that it is never there in part.

    Args:
        file: In the run folder; until all is written, `.partial` beside it has what there is.
        content: What it is to hold.
    """
    partial = file.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(file)


class StepRecord(NamedTuple):
    """One line of `metrics.jsonl`, what is known after a step.

    Attributes:
        step: Number of optimizer steps taken.
        objective: Of each task on the step's batch; None at step 0.
        held_out: The objective of each task on held-out data, where this step looked at it.
        agreement: The held-out agreement of each task, where this step looked.
        seconds: Wall-clock time of the step.
    """

    step: int
    objective: ByTask | None
    held_out: ByTask | None
    agreement: ByTask | None
    seconds: float


Stage = list[StepRecord]
"""The steps of one run of the learning loop, in their order."""


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """What a run folder holds; what is not there is None, or empty.

    Attributes:
        folder: The run folder.
        recipe: The recipe with all defaults filled in, as YAML has it.
        stages: Steps of each run of the learning loop: coarse coefficients first, if any.
        coefficients: The learned coefficients.
        rows: The table of results.
        record: The contents of `run.json`.
    """

    folder: Path
    recipe: dict[str, Any]
    stages: list[Stage]
    coefficients: Coefficients | None
    rows: list[Row]
    record: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "SavedRun":
        """Reads a run folder.

        Raises:
            InputError: It is none, or a file in it cannot be read.
        """
        if not (folder / RECIPE_FILE).is_file():
            raise InputError(
                f"{folder} is no run folder: it has no {RECIPE_FILE}; give the folder that "
                "`adamerge learn` has written"
            )
        coefficients = folder / COEFFICIENTS_FILE
        try:
            recipe = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))
            tasks = list(recipe["tasks"])
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise InputError(f"{folder / RECIPE_FILE} is no recipe: {error}") from error
        if missing := [field for field in _FILLED_IN if not _has(recipe, field)]:
            raise InputError(
                f"{folder} is no run folder: its {RECIPE_FILE} lacks {missing[0]}, which a run "
                "fills in; give the folder that `adamerge learn` has written"
            )
        return cls(
            folder,
            recipe,
            _read_stages(folder / METRICS_FILE, tasks),
            Coefficients.load(coefficients) if coefficients.is_file() else None,
            _read_rows(folder / RESULTS_FILE),
            _read_json(folder / RECORD_FILE),
        )

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(self.recipe["tasks"])

    @property
    def kept(self) -> StepRecord | None:
        """The step that the coefficients are of, if the last stage got so far."""
        if self.coefficients is None or not self.stages:
            return None
        coarse = self.recipe["coefficients"].get("coarse")
        if coarse is not None and len(self.stages) > 1:
            # Of a run that was cut short the file may still hold the coarse coefficients.
            wanted = self.recipe["coefficients"]["granularity"].removeprefix("importance_")
            if self.coefficients.granularity != wanted:
                return None
        step = self.coefficients.step
        return next((record for record in self.stages[-1] if record.step == step), None)


def _has(fields: Any, path: str) -> bool:
    """Whether nested dictionaries have a field, such as `base.path`."""
    for name in path.split("."):
        if not isinstance(fields, dict) or name not in fields:
            return False
        fields = fields[name]
    return True


def _read_stages(file: Path, tasks: list[str]) -> list[Stage]:
    """The lines of `metrics.jsonl`; a stage starts at step 0."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    stages: list[dict[int, StepRecord]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            record = StepRecord(*(fields[name] for name in StepRecord._fields))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines):
                break  # the process ended while it wrote this line
            raise InputError(f"{file}, line {number}: {error!r}; expected a step's JSON") from error
        if record.step == 0 or not stages:
            stages.append({})
        # Steps that were done again, after an interruption, count as they went the last time.
        stages[-1][record.step] = record
    return [[steps[step] for step in sorted(steps)] for steps in stages]


def _read_rows(file: Path) -> list[Row]:
    try:
        return [
            Row(row["method"], row["tasks"], row["metric"])
            for row in _read_json(file).get("rows", [])
        ]
    except (KeyError, TypeError) as error:
        raise InputError(f"{file}: {error!r}; expected the table of results of a run") from error


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file."""
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: no readable JSON ({error})") from error
