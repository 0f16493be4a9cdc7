"""Scores of merges that are measured once: what the log of a run has is not measured again."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from adamerge_jax.devices import is_first_process
from adamerge_jax.errors import InputError
from adamerge_jax.runs.evaluations import Evaluation, append_evaluation
from adamerge_jax.search.candidates import Candidates, Point
from adamerge_jax.search.scores import Score
from adamerge_jax.stopping import require_going_on

OnEvaluation = Callable[[Evaluation], None]


class Scored:
    """The evaluations of a run, in their order: those of its log first, then new ones.

    The log is all the state that a search has: going on, it asks for the same merges again.

    Attributes:
        evaluations: The evaluations that were asked for, or tried, so far.
    """

    def __init__(self, candidates: Candidates, score: Score, log: list[Evaluation]):
        """Begins at the first evaluation; nothing is written yet.

        Args:
            candidates: The merges.
            score: Their score.
            log: The evaluations that the run has made before it was interrupted.
        """
        self.evaluations: list[Evaluation] = []
        self._candidates, self._score = candidates, score
        self._done = list(log)
        self._written = len(log)
        self._file: Path | None = None
        self._on_evaluation: OnEvaluation = lambda evaluation: None

    def try_first(self, point: Point, phase: str) -> None:
        """Measures the first evaluation, so that a score that fails does so before a run begins."""
        if not self._done:
            self._done.append(self._measure(point, phase, 1))

    def write_to(self, file: Path, on_evaluation: OnEvaluation) -> None:
        """Writes evaluations from now on.

        Args:
            file: The log, which has those that the run has made before.
            on_evaluation: Called with each that was measured in this process.
        """
        self._file, self._on_evaluation = file, on_evaluation

    def __call__(self, point: Point, phase: str) -> Evaluation:
        """Returns the next evaluation: that of the log, or a new one.

        Raises:
            InputError: The log has another merge in this place, or a command fails.
        """
        number = len(self.evaluations) + 1
        if number > len(self._done):
            require_going_on()
            self._done.append(self._measure(point, phase, number))
        evaluation = self._done[number - 1]
        by_group = self._candidates.by_group(point)
        if evaluation.coefficients.keys() != by_group.keys() or not np.allclose(
            self._candidates.point(evaluation.coefficients), point, rtol=1e-6, atol=1e-9
        ):
            raise InputError(
                f"evaluation {number} of the run folder is of other coefficients; it was made by "
                "another command or version: choose another folder, or remove it first"
            )
        self.evaluations.append(evaluation)
        if number > self._written and self._file is not None:
            if is_first_process():
                append_evaluation(self._file, evaluation)
            self._written = number
            self._on_evaluation(evaluation)
        return evaluation

    @property
    def sign(self) -> int:
        """1 where more is better, else -1."""
        return 1 if self._score.maximise else -1

    def signed(self, evaluation: Evaluation) -> float:
        """Returns the score of an evaluation such that more is better."""
        return self._score.signed(evaluation.score)

    def best(self) -> Evaluation:
        """Returns the best evaluation so far; of several the first."""
        return max(self.evaluations, key=self.signed)

    def _measure(self, point: Point, phase: str, number: int) -> Evaluation:
        started = time.perf_counter()
        tasks = self._score.measure(self._candidates, point)
        return Evaluation(
            number,
            phase,
            self._candidates.by_group(point),
            self._score.mean(tasks),
            {} if tasks.keys() == {"command"} else tasks,
            round(time.perf_counter() - started, 3),
        )
