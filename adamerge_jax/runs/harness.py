"""The scores of models by EleutherAI's lm-evaluation-harness, as `results.json` keeps them."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat

ModelKind = Literal["base", "expert", "merge"]
"""The part that a model plays in a merge."""


def _finite_or_none(value: Any) -> Any:
    """Returns None for a number that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Score = Annotated[FiniteFloat | None, BeforeValidator(_finite_or_none)]
"""A score; None where it is not finite, or not known."""


class HarnessScore(BaseModel):
    """A model's score on a task by one metric.

    Attributes:
        metric: The harness's name of the metric, such as `acc_norm`.
        filter: The way in which answers are read, `none` where there is one only.
        value: The score.
        stderr: Its standard error.
        higher_is_better: False where less is better; None where the task does not say.
    """

    model_config = ConfigDict(extra="forbid")
    metric: str
    filter: str = "none"
    value: Score
    stderr: Score = None
    higher_is_better: bool | None = None

    @property
    def in_words(self) -> str:
        """The metric, with its filter where there are several."""
        return self.metric if self.filter == "none" else f"{self.metric} ({self.filter})"


class HarnessTask(BaseModel):
    """A model's scores on a task, or on a group of tasks.

    Attributes:
        name: The harness's name of it.
        shown: False for a part of a group that has scores of its own.
        shots: The number of solved examples in a prompt; None where parts of a group differ.
        examples: The number of examples.
        version: The harness's version of the task.
        scores: A score for each metric.
    """

    model_config = ConfigDict(extra="forbid")
    name: str
    shown: bool = True
    shots: int | None = None
    examples: int | None = None
    version: str | None = None
    scores: list[HarnessScore]


class HarnessRow(BaseModel):
    """The scores of one model.

    Attributes:
        model: Its name: `base`, the task of an expert, or that of the merge.
        kind: The part that it plays.
        tasks: Its scores by task.
    """

    model_config = ConfigDict(extra="forbid")
    model: str
    kind: ModelKind
    tasks: list[HarnessTask] = Field(min_length=1)


class HarnessLine(NamedTuple):
    """The scores of all models on one task by one metric.

    Attributes:
        task: The task.
        shots: The number of solved examples in a prompt; None where that is not one number.
        metric: The metric in words.
        scores: A score for each model.
        higher_is_better: False where less is better; None where that is not known.
    """

    task: str
    shots: int | None
    metric: str
    scores: list[HarnessScore]
    higher_is_better: bool | None


class HarnessResults(BaseModel):
    """The scores of all models.

    Attributes:
        version: The version of the harness.
        limit: The largest number of examples of each task; None for all.
        chat_template: True if prompts were written in the merge's chat template.
        rows: The models, the merge last.
    """

    model_config = ConfigDict(extra="forbid")
    version: str
    limit: int | None = None
    chat_template: bool = False
    rows: list[HarnessRow] = Field(min_length=1)

    def lines(self) -> Iterator[HarnessLine]:
        """Yields the scores of the tasks that are shown, a line for each task and metric."""
        for position, task in enumerate(self.rows[-1].tasks):
            for number, score in enumerate(task.scores if task.shown else ()):
                scores = [row.tasks[position].scores[number] for row in self.rows]
                better = score.higher_is_better
                yield HarnessLine(task.name, task.shots, score.in_words, scores, better)

    def inconsistency(self) -> str | None:
        """Returns in words why the rows cannot be of one evaluation, or None."""
        measured = [
            [(task.name, [score.in_words for score in task.scores]) for task in row.tasks]
            for row in self.rows
        ]
        for row, tasks in zip(self.rows, measured, strict=True):
            if tasks != measured[0]:
                other = self.rows[0].model
                return f"the lm-eval scores of {row.model!r:.80} are others than {other!r:.80}'s"
        return None
