"""The file that keeps the table of results of a run and the outcome of its merge."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from adamerge_jax.errors import InputError, in_one_line
from adamerge_jax.files.json_object import read_object_if_there
from adamerge_jax.files.writing import write_whole
from adamerge_jax.runs.harness import HarnessResults
from adamerge_jax.runs.outcome import Outcome, measure_outcome
from adamerge_jax.runs.rows import Row, best_without_learning, further_tables


class Results(NamedTuple):
    """The contents of `results.json`.

    Attributes:
        rows: The table, the learned merge last; empty without test data.
        outcome: The outcome of the merge; None without rows, or without a finite score.
        further: The tables and outcomes by other metrics, of all tasks or of some.
        harness: The scores by lm-eval; None where none were asked for.
    """

    rows: list[Row]
    outcome: Outcome | None = None
    further: Sequence["Results"] = ()
    harness: HarnessResults | None = None

    @property
    def tables(self) -> list["Results"]:
        """The tables by all metrics, the one of all tasks first; empty without test data."""
        return [self, *self.further] if self.rows else []

    @classmethod
    def of_rows(cls, rows: list[Row]) -> "Results":
        """Measures the outcome of a table, and of those by other metrics.

        Args:
            rows: The table, the merge last.
        """
        further = (cls(table, measure_outcome(table)) for table in further_tables(rows))
        return cls(rows, measure_outcome(rows), tuple(further))

    def as_json(self) -> dict[str, Any]:
        """Returns the fields of `results.json`."""
        fields: dict[str, Any] = {"rows": [row.as_json() for row in self.rows]}
        if self.outcome is not None:
            fields["outcome"] = dataclasses.asdict(self.outcome)
        if self.further:
            fields["further"] = [table.as_json() for table in self.further]
        if self.harness is not None:
            fields["lm_eval"] = self.harness.model_dump(mode="json")
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Results":
        """Makes the results of `as_json`.

        Raises:
            KeyError: A field is missing.
            TypeError: A field has another type.
            ValueError: A field has another type or value.
        """
        rows = [Row.from_json(row) for row in fields.get("rows", [])]
        outcome = TypeAdapter(Outcome | None).validate_python(fields.get("outcome"))
        tables = TypeAdapter(list[dict[str, Any]]).validate_python(fields.get("further", []))
        harness = TypeAdapter(HarnessResults | None).validate_python(fields.get("lm_eval"))
        return cls(rows, outcome, tuple(cls.from_json(table) for table in tables), harness)


def write_results(results: Results, path: Path) -> None:
    """Writes the table and the outcome as JSON.

    That is `{"rows": [{"method", "kind", "metric", "tasks": {task: score}, "average"}], "outcome"}`
    with the fields of `Outcome`, and for a language model `"further"`, a list of the same by other
    metrics, and `"lm_eval"`, the fields of `HarnessResults`.
    """
    write_whole(path, json.dumps(results.as_json(), indent=2, ensure_ascii=False) + "\n")


def read_results(file: Path) -> Results:
    """Reads the table and the outcome; without a file there are no rows.

    In a file from before it was kept the outcome is measured from the rows, without intervals.

    Raises:
        InputError: The file is no table of results.
    """
    fields = read_object_if_there(file)
    try:
        results = Results.from_json(fields)
    except (KeyError, TypeError, ValidationError) as error:
        reason = in_one_line(error) if isinstance(error, ValidationError) else f"{error!r:.200}"
        raise InputError(f"{file}: {reason}; expected the table of results of a run") from error
    for table in (results, *results.further):
        if problem := _inconsistency(table):
            raise InputError(
                f"{file}: {problem}; the file was changed: take it from the run again, or evaluate "
                "anew"
            )
    return results if results.outcome else results._replace(outcome=measure_outcome(results.rows))


def _inconsistency(results: Results) -> str | None:
    """Returns in words why a table and an outcome cannot be of one run, or None."""
    rows, outcome, further, harness = results
    if any(not table.rows or table.further or table.harness for table in further):
        return "a table by another metric has no rows, or tables within"
    if harness is not None and (problem := harness.inconsistency()):
        return problem
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
