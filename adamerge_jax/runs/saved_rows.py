"""Rows of results with the scores of their examples, as files keep them."""

from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from adamerge_jax.runs.rows import ExampleScores, Row

_LARGEST = 2**31 - 1
"""The largest number of int32, which counts and classes are read as."""


class SavedScores(BaseModel):
    """The scores of one task's examples."""

    model_config = ConfigDict(extra="forbid")
    values: list[float]
    counts: list[Annotated[int, Field(ge=0, le=_LARGEST)]]
    classes: list[Annotated[int, Field(ge=-1, le=_LARGEST)]] | None = None


class SavedRow(BaseModel):
    """A row, with the scores of its examples and the same model's rows by other metrics."""

    model_config = ConfigDict(extra="forbid")
    row: dict[str, Any]
    examples: dict[str, SavedScores]
    further: list["SavedRow"]

    @classmethod
    def of(cls, row: Row) -> "SavedRow":
        """Returns a row as it is saved."""
        examples = {
            task: SavedScores(
                # Exactly: a correlation near 0 is the mean of much larger numbers.
                values=scores.values.tolist(),
                counts=scores.counts.tolist(),
                classes=None if scores.classes is None else scores.classes.tolist(),
            )
            for task, scores in (row.examples or {}).items()
        }
        return cls(
            row=row.as_json(), examples=examples, further=[cls.of(other) for other in row.further]
        )

    def restored(self) -> Row:
        """Returns the row that was saved.

        Raises:
            ValueError: A field has another type.
            KeyError: A field is missing.
        """
        examples = {
            task: ExampleScores(
                np.asarray(scores.values, np.float64),
                np.asarray(scores.counts, np.int32),
                None if scores.classes is None else np.asarray(scores.classes, np.int32),
            )
            for task, scores in self.examples.items()
        }
        further = tuple(other.restored() for other in self.further)
        return Row.from_json(self.row)._replace(examples=examples, further=further)
