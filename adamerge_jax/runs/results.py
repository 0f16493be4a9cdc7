"""The file that keeps the table of results of a run and the outcome of its merge."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from adamerge_jax.errors import InputError, in_one_line
from adamerge_jax.files.json_object import read_object_if_there
from adamerge_jax.files.writing import write_whole
from adamerge_jax.runs.outcome import Outcome, measure_outcome
from adamerge_jax.runs.rows import Row, best_without_learning


class Results(NamedTuple):
    """The contents of `results.json`.

    Attributes:
        rows: The table, the learned merge last; empty without test data.
        outcome: The outcome of the merge; None without rows, or without a finite score.
    """

    rows: list[Row]
    outcome: Outcome | None = None


def write_results(results: Results, path: Path) -> None:
    """Writes the table and the outcome as JSON.

    That is `{"rows": [{"method", "kind", "metric", "tasks": {task: score}, "average"}], "outcome"}`
    with the fields of `Outcome`.
    """
    fields: dict[str, Any] = {"rows": [row.as_json() for row in results.rows]}
    if results.outcome is not None:
        fields["outcome"] = dataclasses.asdict(results.outcome)
    write_whole(path, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


def read_results(file: Path) -> Results:
    """Reads the table and the outcome; without a file there are no rows.

    In a file from before it was kept the outcome is measured from the rows, without intervals.

    Raises:
        InputError: The file is no table of results.
    """
    fields = read_object_if_there(file)
    try:
        rows = [Row.from_json(row) for row in fields.get("rows", [])]
        outcome = TypeAdapter(Outcome | None).validate_python(fields.get("outcome"))
    except (KeyError, TypeError, ValidationError) as error:
        reason = in_one_line(error) if isinstance(error, ValidationError) else f"{error!r:.200}"
        raise InputError(f"{file}: {reason}; expected the table of results of a run") from error
    results = Results(rows, outcome)
    if problem := _inconsistency(results):
        raise InputError(
            f"{file}: {problem}; the file was changed: take it from the run again, or evaluate anew"
        )
    return results if outcome else Results(rows, measure_outcome(rows))


def _inconsistency(results: Results) -> str | None:
    """Returns in words why a table and an outcome cannot be of one run, or None."""
    rows, outcome = results
    if not rows:
        return None
    for row in rows:
        if not row.tasks or row.tasks.keys() != rows[0].tasks.keys():
            return (
                f"the row {row.method!r:.80} has other tasks than {rows[0].method!r:.80}, or none"
            )
        if row.metric != rows[0].metric:
            metrics = f"the metric {row.metric!r}, others {rows[0].metric!r}"
            return f"the row {row.method!r:.80} has {metrics}"
    if outcome is None:
        return None
    reference = best_without_learning(rows[:-1])
    if (reference.method if reference else None) != outcome.reference:
        return f"its outcome refers to {outcome.reference!r:.80}, which is not the best row"
    if outcome.tasks.keys() != rows[-1].tasks.keys() or not math.isclose(
        outcome.average.score.value, rows[-1].average, rel_tol=1e-9
    ):
        return "its outcome is not that of its rows"
    return None
