"""The table of results of a run, and the file that keeps it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from adamerge_jax.errors import InputError
from adamerge_jax.runs.files import read_json
from adamerge_jax.writing import write_whole

Metric = Literal["accuracy", "loss"]
"""The meaning of a score: the share of right classes, or nats per token."""


class Row(NamedTuple):
    """One line of the table of results.

    Attributes:
        method: Name of the model that was evaluated.
        tasks: Accuracy by task, from 0 to 1; or loss by task, in nats per token.
        metric: The meaning of these scores.
    """

    method: str
    tasks: dict[str, float]
    metric: Metric = "accuracy"

    @property
    def average(self) -> float:
        """The mean over the tasks."""
        return float(np.mean(list(self.tasks.values())))

    @property
    def score(self) -> float:
        """The average, with its sign turned where less is better."""
        return self.average if self.metric == "accuracy" else -self.average


def write_results(rows: Sequence[Row], path: Path) -> None:
    """Writes the table as JSON.

    That is `{"rows": [{"method", "metric", "tasks": {task: score}, "average"}]}`.
    """
    lines = [
        {"method": row.method, "metric": row.metric, "tasks": row.tasks, "average": row.average}
        for row in rows
    ]
    write_whole(path, json.dumps({"rows": lines}, indent=2) + "\n")


def read_results(file: Path) -> list[Row]:
    """Reads the table; it is empty where there is no file.

    Raises:
        InputError: The file is no table of results.
    """
    try:
        return [
            Row(row["method"], row["tasks"], row["metric"])
            for row in read_json(file).get("rows", [])
        ]
    except (KeyError, TypeError) as error:
        raise InputError(f"{file}: {error!r}; expected the table of results of a run") from error
