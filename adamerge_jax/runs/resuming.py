"""Going on with a run that was killed: which run folders allow it, and what is removed first."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from adamerge_jax.checkpoints.folders import require_new
from adamerge_jax.errors import InputError
from adamerge_jax.runs.files import (
    COEFFICIENTS_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    STATE_FOLDER,
    write_whole,
)


def require_startable(out: Path, recipe: Mapping[str, Any], *, resume: bool) -> None:
    """Refuses a run folder that cannot be started in; changes nothing.

    Args:
        out: The run folder. With `resume` it may be new, too: a job that a cluster starts again and
            again is given the same command every time.
        recipe: The recipe to run with all its defaults, as YAML has it.
        resume: True to go on with the run that is there.

    Raises:
        InputError: It is in use, or what is in it is no unfinished run of this recipe.
    """
    if not resume and (out / STATE_FOLDER).is_dir():
        raise InputError(
            f"{out} holds an unfinished run; go on with it with --resume, choose another folder, "
            "or remove it first"
        )
    if not resume or not out.is_dir() or not any(out.iterdir()):
        require_new(out)
        return
    if not (out / RECIPE_FILE).is_file():
        raise InputError(f"{out} holds no run to go on with; choose another folder")
    if (out / COEFFICIENTS_FILE).exists() and not (out / STATE_FOLDER).is_dir():
        raise InputError(
            f"{out} holds a run that has ended, there is nothing to go on with; choose another "
            "folder, or remove it first"
        )
    before = yaml.safe_load((out / RECIPE_FILE).read_text(encoding="utf-8"))
    # A run may go on elsewhere: what it computes is the same.
    before, now = (
        {k: v for k, v in fields.items() if k != "devices"} for fields in (before, recipe)
    )
    if difference := _first_difference(before, now):
        field, was, is_now = difference
        raise InputError(
            f"{out} was started with another recipe: {field} was {was!r}, now it is {is_now!r}; "
            "change it back, or choose another folder"
        )


def discard_after_last_snapshot(out: Path, exports: tuple[str, ...]) -> int | None:
    """Removes from a run folder what was written after its last state.

    Args:
        out: A run folder that `require_startable` let pass.
        exports: Folders that are written when learning has ended.

    Returns:
        The number of steps, of all stages, that need not be taken again; None where there is no
        state.
    """
    from adamerge_jax.learning.snapshots import last_step

    for folder in (*(out / name for name in exports), *out.glob(".*.partial-*")):
        shutil.rmtree(folder, ignore_errors=True)
    stages = map(last_step, (out / STATE_FOLDER).glob("*"))
    steps = [step for step in stages if step is not None]
    metrics = out / METRICS_FILE
    if metrics.is_file():
        with metrics.open("rb") as file:
            # A stage has one line for its start and one for every step.
            lines = b"".join(file.readline() for _ in range(sum(steps) + len(steps)))
        write_whole(metrics, lines)
    return sum(steps) if steps else None


def _first_difference(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> tuple[str, Any, Any] | None:
    """Returns the first field in which two recipes differ, with its value in each.

    A field that is missing is as one that is null. The order of names counts: it is that of the
    experts, and of name patterns.
    """
    for name in {**before, **now}:
        was, is_now = before.get(name), now.get(name)
        if not (isinstance(was, dict) and isinstance(is_now, dict)):
            if was != is_now:
                return name, was, is_now
            continue
        if difference := _first_difference(was, is_now):
            field, was, is_now = difference
            return f"{name}.{field}", was, is_now
        orders = [key for key in was if key in is_now], [key for key in is_now if key in was]
        if orders[0] != orders[1]:
            return name, *orders
    return None
