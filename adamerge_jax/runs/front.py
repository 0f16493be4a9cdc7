"""The file that keeps a front: its points, and what they are compared with."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from pydantic import TypeAdapter, ValidationError

from adamerge_jax.errors import InputError, in_one_line
from adamerge_jax.files.json_object import read_object
from adamerge_jax.files.writing import write_whole

ByTask = dict[str, float]

_LARGEST = 1e30
"""The largest size of a score or a coefficient: what is drawn has a finite extent."""


@dataclasses.dataclass(frozen=True)
class FrontPoint:
    """A merge on the front.

    Attributes:
        file: The name of its coefficients file in the folder of the front.
        coefficients: The coefficient of each expert.
        scores: The score of each task, measured on the validation data.
        predicted: The score of each task on a surface that was fitted without this point.
        test: The score of each task on the test data, in the table's metric; empty without.
    """

    file: str
    coefficients: ByTask
    scores: ByTask
    predicted: ByTask
    test: ByTask


@dataclasses.dataclass(frozen=True)
class SurfaceError:
    """How well a quadratic surface stands in for the score of a task.

    Attributes:
        error: The root mean square of its differences to the scores that it was fitted to.
        left_out_error: That of each score's difference to the surface fitted to all others.
        spread: The standard deviation of the scores.
    """

    error: float
    left_out_error: float
    spread: float


@dataclasses.dataclass(frozen=True)
class Front:
    """The front of what one task costs another; all scores are of the validation data.

    Attributes:
        score: The name of the score: `accuracy`, `loss`.
        maximise: True where more is better.
        points: The points, from the best to the worst in the first task.
        experts: The score of each task's expert.
        singles: The scores of merges with the same coefficient for all experts, and these.
        others: The scores of all other merges that were measured.
        fits: The fit of each task's surface.
    """

    score: str
    maximise: bool
    points: list[FrontPoint]
    experts: ByTask
    singles: list[tuple[float, ByTask]]
    others: list[ByTask]
    fits: dict[str, SurfaceError]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(self.experts)

    @property
    def best(self) -> int:
        """The position of the point that is best on average."""
        return _best([point.scores for point in self.points], self.maximise)

    @property
    def best_single(self) -> tuple[float, ByTask]:
        """The single coefficient that is best on average, and its scores."""
        return self.singles[_best([scores for _, scores in self.singles], self.maximise)]

    def write(self, file: Path) -> None:
        """Writes the front as JSON."""
        fields = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        write_whole(file, f"{fields}\n")

    @classmethod
    def read(cls, file: Path) -> "Front | None":
        """Reads a front; None where there is no file.

        Raises:
            InputError: The file is no front.
        """
        if not file.is_file():
            return None
        fields: dict[str, Any] = read_object(file)
        try:
            front = TypeAdapter(Front).validate_python(fields)
        except ValidationError as error:
            raise InputError(
                f"{file}: {in_one_line(error)}; expected the front of a run"
            ) from error
        by_task: list[Mapping[str, object]] = [
            *(scores for point in front.points for scores in _all_scores(point)),
            *(scores for _, scores in front.singles),
            *front.others,
            front.fits,
        ]
        numbers = [
            number for scores in by_task if scores is not front.fits for number in scores.values()
        ]
        numbers += [value for value, _ in front.singles] + list(front.experts.values())
        if any(not abs(number) <= _LARGEST for number in numbers):
            raise InputError(
                f"{file}: a number is not finite, or over {_LARGEST:g}; the file was changed: take "
                "it from the run again, or run again"
            )
        if not (front.experts and front.points and front.singles) or any(
            scores.keys() != front.experts.keys() for scores in by_task
        ):
            raise InputError(
                f"{file}: scores are not of the same tasks, or there are none; the file was "
                "changed: take it from the run again, or run again"
            )
        return front


def non_dominated(scores: Float[np.ndarray, "N T"]) -> Bool[np.ndarray, " N"]:
    """Returns True for each point that no other one dominates.

    One point dominates another if it is at least as good in every score and better in one; more is
    better. Of points with the same scores the first counts.
    """
    mask = np.ones(len(scores), bool)
    for position, point in enumerate(scores):
        at_least = (scores >= point).all(1)
        better = at_least & (scores > point).any(1)
        same_before = at_least[:position] & (scores[:position] == point).all(1)
        mask[position] = not (better.any() or same_before.any())
    return mask


def _all_scores(point: FrontPoint) -> list[ByTask]:
    return [
        point.coefficients,
        point.scores,
        point.predicted,
        *([point.test] if point.test else []),
    ]


def _best(scores: list[ByTask], maximise: bool) -> int:
    """Returns the position of the best mean; of several the first."""
    sign = 1 if maximise else -1
    return max(range(len(scores)), key=lambda at: sign * sum(scores[at].values()))
