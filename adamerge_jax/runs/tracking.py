"""Trackers that the numbers of a run are sent to: TensorBoard, Weights & Biases.

A tracker gets what `metrics.jsonl` gets, under names such as `held_out/sentiment`. Its package is
installed by who asks for it and is imported only then.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from adamerge_jax.errors import InputError

TrackerName = Literal["tensorboard", "wandb"]

Log = Callable[[int, Mapping[str, float]], None]
"""`(step, numbers by name) -> None`."""

FINAL = "learning"
"""Name of the stage whose coefficients are the result; other stages are tracked beside it."""


class Tracker(NamedTuple):
    """A service or format that takes numbers.

    Attributes:
        package: The package that must be installed.
        open: `(folder, stage, run name, recipe)` to a context whose value takes numbers.
    """

    package: str
    open: Callable[[Path, str, str, Mapping[str, Any]], Any]


@contextmanager
def _tensorboard(folder: Path, stage: str, name: str, recipe: Mapping[str, Any]) -> Iterator[Log]:
    """Writes event files in `tensorboard/<stage>/`: each stage is a run of its own there."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard" / stage)) as writer:

        def log(step: int, numbers: Mapping[str, float]) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)

        yield log


@contextmanager
def _wandb(folder: Path, stage: str, name: str, recipe: Mapping[str, Any]) -> Iterator[Log]:
    """Starts a Weights & Biases run; its own variables hold, `WANDB_MODE=offline` for one."""
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "adamerge_jax"),
        name=name if stage == FINAL else f"{name} ({stage})",
        dir=folder,
        config=dict(recipe),
    )
    status = 1
    try:
        yield lambda step, numbers: run.log(dict(numbers), step=step)
        status = 0
    finally:
        run.finish(exit_code=status)


TRACKERS: dict[TrackerName, Tracker] = {
    "tensorboard": Tracker("tensorboardX", _tensorboard),
    "wandb": Tracker("wandb", _wandb),
}
"""Trackers by their names in a recipe, which are those of the extras of this package too."""


def require_installed(names: Sequence[TrackerName]) -> None:
    """Refuses trackers whose package is not there, before a run has done anything.

    Raises:
        InputError: Says how to install it.
    """
    for name in names:
        if find_spec(TRACKERS[name].package) is None:
            raise InputError(
                f"tracking: {name} needs the package {TRACKERS[name].package}; install it with "
                f"pip install 'adamerge_jax[{name}]', or leave {name} out"
            )


@contextmanager
def track(
    names: Sequence[TrackerName], folder: Path, stage: str, recipe: Mapping[str, Any]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Opens trackers for one stage of learning, and closes them however it ends.

    Args:
        names: Names of trackers; none is fine.
        folder: The run folder.
        stage: Name of the stage.
        recipe: The recipe with all defaults filled in, `name` among its fields.

    Yields:
        `on_record`, to be called with each record of `metrics.jsonl`.
    """
    with ExitStack() as stack:
        logs = [
            stack.enter_context(TRACKERS[name].open(folder, stage, recipe["name"], recipe))
            for name in names
        ]

        def on_record(record: Mapping[str, Any]) -> None:
            for log in logs:
                log(record["step"], flatten(record))

        yield on_record


def flatten(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a record of `metrics.jsonl`: `objective/sentiment`, `seconds`."""
    numbers: dict[str, float] = {}
    for field, value in record.items():
        if isinstance(value, Mapping):
            by_task = {task: number for task, number in value.items() if number is not None}
            numbers |= {f"{field}/{task}": number for task, number in by_task.items()}
        elif field != "step" and value is not None:
            numbers[field] = value
    return numbers
