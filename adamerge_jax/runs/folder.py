"""Reading a run folder, whether the run has finished or not."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.errors import InputError
from adamerge_jax.files.json_object import read_object_if_there
from adamerge_jax.recipes.loading import read_fields
from adamerge_jax.runs.evaluations import Evaluation, read_evaluations
from adamerge_jax.runs.files import (
    COEFFICIENTS_FILE,
    EVALUATIONS_FILE,
    FRONT_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    RECIPE_FILE,
    RECORD_FILE,
    RESULTS_FILE,
    WITHOUT_EXPERTS_FILE,
)
from adamerge_jax.runs.front import Front
from adamerge_jax.runs.outcome import Outcome
from adamerge_jax.runs.predictions import Predictions, read_predictions
from adamerge_jax.runs.results import Results, read_results
from adamerge_jax.runs.rows import Row
from adamerge_jax.runs.without_experts import read_without_experts

_FILLED_IN = (
    "base.path",
    "tasks",
    "preset",
    "keep_from_base",
    "coefficients.granularity",
    "coefficients.constraint",
    "learning.steps",
)
"""Fields that the recipe of a run has whatever its user wrote, and that are read from it."""

ByTask = dict[str, float | None]


class StepRecord(NamedTuple):
    """One line of `metrics.jsonl`: the numbers of a step.

    Attributes:
        step: Number of optimizer steps taken.
        objective: The objective of each task on the step's batch; None at step 0.
        held_out: The objective of each task on held-out data, where this step evaluated it.
        agreement: The held-out agreement of each task, where this step evaluated it.
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
    """The contents of a run folder; what is not there is None, or empty.

    Attributes:
        folder: The run folder.
        recipe: The recipe with all defaults filled in, as YAML has it.
        stages: Steps of each run of the learning loop: coarse coefficients first, if any.
        coefficients: The learned coefficients.
        results: The tables of results and their outcomes.
        record: The contents of `run.json`.
        evaluations: The merges that a search or a front has scored.
        front: The front.
        predictions: What the merge takes for what, by task; empty where that is not known.
        without_experts: A row of scores without each expert; empty where that is not known.
    """

    folder: Path
    recipe: dict[str, Any]
    stages: list[Stage]
    coefficients: Coefficients | None
    results: Results
    record: dict[str, Any]
    evaluations: list[Evaluation] = dataclasses.field(default_factory=list)
    front: Front | None = None
    predictions: Predictions = dataclasses.field(default_factory=dict)
    without_experts: list[Row] = dataclasses.field(default_factory=list)

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
        recipe = read_fields(folder / RECIPE_FILE)
        if missing := [field for field in _FILLED_IN if not _has(recipe, field)]:
            raise InputError(
                f"{folder} is no run folder: its {RECIPE_FILE} lacks {missing[0]}, which a run "
                "fills in; give the folder that `adamerge learn` has written"
            )
        if not isinstance(recipe["tasks"], dict):
            raise InputError(f"{folder / RECIPE_FILE}: tasks: expected tasks by name")
        results = read_results(folder / RESULTS_FILE)
        merge = results.rows[-1] if results.rows else None
        return cls(
            folder,
            recipe,
            _read_stages(folder / METRICS_FILE),
            Coefficients.load(coefficients) if coefficients.is_file() else None,
            results,
            read_object_if_there(folder / RECORD_FILE),
            read_evaluations(folder / EVALUATIONS_FILE),
            Front.read(folder / FRONT_FILE),
            read_predictions(folder / PREDICTIONS_FILE),
            read_without_experts(folder / WITHOUT_EXPERTS_FILE, merge),
        )

    @property
    def rows(self) -> list[Row]:
        """The table of results."""
        return self.results.rows

    @property
    def outcome(self) -> Outcome | None:
        """The outcome of the merge."""
        return self.results.outcome

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(self.recipe["tasks"])

    @property
    def learned_from(self) -> list[str]:
        """Names of what was learned from: the tasks, and `base` where there was general text."""
        steps = [record for stage in self.stages for record in stage]
        shown = dict.fromkeys(name for record in steps for name in record.held_out or ())
        return [*self.tasks, *(name for name in shown if name not in self.tasks)]

    @property
    def best(self) -> StepRecord | None:
        """The step whose coefficients were kept, if the last stage got so far."""
        if self.coefficients is None or not self.stages:
            return None
        coarse = self.recipe["coefficients"].get("coarse")
        if coarse is not None and len(self.stages) > 1:
            # Of a run that was cut short the file may still hold the coarse coefficients.
            wanted = self.recipe["coefficients"]["granularity"]
            if self.coefficients.granularity == coarse["granularity"] != wanted:
                return None
        step = self.coefficients.step
        return next((record for record in self.stages[-1] if record.step == step), None)


def _has(fields: Any, path: str) -> bool:
    """Returns whether nested dictionaries have a field, such as `base.path`."""
    for name in path.split("."):
        if not isinstance(fields, dict) or name not in fields:
            return False
        fields = fields[name]
    return True


def _read_stages(file: Path) -> list[Stage]:
    """Reads the lines of `metrics.jsonl`; a stage starts at step 0."""
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
