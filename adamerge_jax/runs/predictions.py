"""The file that keeps what a merged classifier takes for what, and examples of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from adamerge_jax.errors import InputError, in_one_line
from adamerge_jax.files.json_object import read_object_if_there
from adamerge_jax.files.writing import write_whole

MOST_CLASSES = 1000
"""The number of classes beyond which no counts are kept."""

_Count = Annotated[int, Field(ge=0, le=10**12)]

_Class = Annotated[int, Field(ge=-1, lt=MOST_CLASSES)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Difference(_Part):
    """A test example to which merge and expert give different classes.

    Attributes:
        index: Its position among the task's test examples.
        label: Its class.
        expert: The class that the expert gives it.
        merge: The class that the merge gives it.
        text: The text, or its beginning; None where it is none.
        image: The image as a small PNG, base64; None where it is none.
    """

    index: _Count
    label: _Class
    expert: _Class
    merge: _Class
    text: str | None = None
    image: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+=*$", max_length=100_000)] | None = None


class Mistake(_Part):
    """A class that is taken for another.

    Attributes:
        label: The class.
        merge: What the merge takes it for; -1 for nothing.
        count: The number of test examples.
    """

    label: _Class
    merge: _Class
    count: _Count


class TaskPredictions(_Part):
    """The predictions of the merge for one task's test examples.

    Attributes:
        class_names: The names of the classes.
        counts: The number of examples of each class that got each class, as far as there are some.
        differing: The number of examples on which merge and expert differ; None where what the
            expert said is not known.
        merge_alone_right: The number of these on which the merge alone is right.
        expert_alone_right: The number of these on which the expert alone is right.
        differences: Some of these examples.
    """

    class_names: list[str]
    counts: list[Mistake]
    differing: _Count | None = None
    merge_alone_right: _Count = 0
    expert_alone_right: _Count = 0
    differences: list[Difference] = []


Predictions = Mapping[str, TaskPredictions]
"""The predictions by task."""

_OF_FILE: TypeAdapter[dict[str, TaskPredictions]] = TypeAdapter(dict[str, TaskPredictions])


def write_predictions(predictions: Predictions, file: Path) -> None:
    """Writes the predictions of all tasks as JSON."""
    write_whole(file, _OF_FILE.dump_json(dict(predictions)).decode() + "\n")


def read_predictions(file: Path) -> Predictions:
    """Reads what `write_predictions` wrote; without a file there are none.

    Raises:
        InputError: The file holds something else, or a class that has no name.
    """
    fields = read_object_if_there(file)
    try:
        predictions = _OF_FILE.validate_python(fields)
    except ValidationError as error:
        raise InputError(
            f"{file}: {in_one_line(error)}; expected the predictions of a run"
        ) from error
    for task, of_task in predictions.items():
        classes = [c for count in of_task.counts for c in (count.label, count.merge)]
        classes += [c for d in of_task.differences for c in (d.label, d.expert, d.merge)]
        if max(classes, default=-1) >= len(of_task.class_names):
            raise InputError(
                f"{file}: {task!r:.80} has a class {max(classes)}, and names of "
                f"{len(of_task.class_names)}; the file was changed: take it from the run again"
            )
    return predictions
