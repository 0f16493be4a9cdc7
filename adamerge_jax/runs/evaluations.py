"""The log of merges that were scored: what a search, or a front, has measured so far.

It is the state of both, too: the same seed and the same scores give the same merges to score next.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

from adamerge_jax.errors import InputError, in_one_line
from adamerge_jax.files.writing import write_whole


class Evaluation(NamedTuple):
    """One line of `evaluations.jsonl`: a merge and its score.

    Attributes:
        number: Its place among the evaluations, from 1.
        phase: The part of the search that asked for it: `single`, `search`, `sample` or `front`.
        coefficients: The coefficients of the K experts by group, as in a coefficients file.
        score: Its score, as it was measured; NaN or infinite where the merge has none.
        tasks: The score of each task; empty where a command has measured.
        seconds: The time that it took.
    """

    number: int
    phase: str
    coefficients: Mapping[str, Sequence[float]]
    score: float
    tasks: Mapping[str, float]
    seconds: float


class _Line(NamedTuple):
    """The types of a line's fields; JSON has null in place of NaN and infinity."""

    number: int
    phase: str
    coefficients: dict[str, list[float]]
    score: float | None
    tasks: dict[str, float | None]
    seconds: float


_LINE = TypeAdapter(_Line)


def append_evaluation(file: Path, evaluation: Evaluation) -> None:
    """Adds a line to the log, and brings it to the disk."""
    tasks = {task: _or_null(score) for task, score in evaluation.tasks.items()}
    fields = evaluation._replace(score=_or_null(evaluation.score), tasks=tasks)._asdict()
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(fields, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_evaluations(file: Path) -> list[Evaluation]:
    """Reads the log; a last line that a killed process has left in part does not count.

    Raises:
        InputError: A line is no evaluation, or not the next one.
    """
    if not file.is_file():
        return []
    *lines, _ = file.read_bytes().split(b"\n")
    return [_parse(file, number, line) for number, line in enumerate(lines, 1)]


def discard_half_line(file: Path) -> None:
    """Removes from the log a last line that a killed process has left in part."""
    if file.is_file():
        content = file.read_bytes()
        write_whole(file, content[: content.rfind(b"\n") + 1])


def _parse(file: Path, number: int, line: bytes) -> Evaluation:
    try:
        fields = _LINE.validate_python(json.loads(line))
    except ValueError as error:  # also of JSON, and of pydantic
        reason = in_one_line(error)
    else:
        if fields.number == number:
            tasks = {task: _or_nan(score) for task, score in fields.tasks.items()}
            return Evaluation(*fields._replace(score=_or_nan(fields.score), tasks=tasks))
        reason = f"it is number {fields.number}"
    raise InputError(f"{file}, line {number}: {reason}; expected the JSON of evaluation {number}")


def _or_null(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _or_nan(number: float | None) -> float:
    return math.nan if number is None else number
