"""The beginning and the end of a run folder: which folders a run may start or go on in.

A folder with `state/` is unfinished: it is there from before the first file to after the last one.
"""

import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adamerge_jax.errors import InputError
from adamerge_jax.files.strict_yaml import read_yaml_file
from adamerge_jax.files.writing import (
    flush_folder,
    is_partial,
    remove_folder,
    remove_partial,
    write_whole,
)
from adamerge_jax.runs.files import (
    COEFFICIENTS_FILE,
    EVALUATIONS_FILE,
    LOCK_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    STATE_FOLDER,
)


def require_startable(
    out: Path, recipe: Mapping[str, Any], *, resume: bool, log: str = METRICS_FILE
) -> None:
    """Refuses a run folder that cannot be started in; changes nothing.

    Args:
        out: The run folder. With `resume` it may be new, too: a job that a cluster starts again and
            again is given the same command every time.
        recipe: The recipe to run with all its defaults, as YAML has it.
        resume: True to go on with the run that is there; it may have ended, see `has_ended`.
        log: The file that the command writes as it goes.

    Raises:
        InputError: It is in use, or what is in it is no run of this recipe.
    """
    if _names(out) <= {STATE_FOLDER}:
        return  # new, or left by a process that was killed before it wrote anything
    if not resume and (out / STATE_FOLDER).is_dir():
        raise InputError(
            f"{out} holds an unfinished run; go on with it with --resume, choose another folder, "
            "or remove it first"
        )
    if not resume:
        raise _not_empty(out)
    if not (out / RECIPE_FILE).is_file():
        raise InputError(f"{out} holds no run to go on with; choose another folder")
    if others := ({METRICS_FILE, EVALUATIONS_FILE} - {log}) & _names(out):
        raise InputError(
            f"{out} was started with another command, which wrote {min(others)}; choose another "
            "folder"
        )
    before = read_yaml_file(out / RECIPE_FILE)
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


def require_new_export(out: Path, exports: Collection[str]) -> None:
    """Refuses a folder that is neither new nor left by an export that was killed.

    Args:
        out: The folder.
        exports: Folders that an export may write.

    Raises:
        InputError: The folder has other files.
    """
    names = _names(out)
    if names and not {STATE_FOLDER} <= names <= {STATE_FOLDER, COEFFICIENTS_FILE, *exports}:
        raise _not_empty(out)


def has_ended(out: Path, export: str) -> bool:
    """Returns True for the folder of a run that has nothing left to do.

    Args:
        out: A run folder that `require_startable` let pass.
        export: The folder that every run writes.

    Raises:
        InputError: The run has diverged, and would do so again.
    """
    if (out / STATE_FOLDER).is_dir() or not (out / COEFFICIENTS_FILE).is_file():
        return False
    if not (out / export).is_dir():
        raise InputError(
            f"{out} holds a run that has ended as its objective was no finite number, there is "
            "nothing to go on with; choose another folder, or remove it first"
        )
    return True


@contextmanager
def unfinished(out: Path, *, anew: bool) -> Iterator[None]:
    """Marks a run folder as unfinished until the block ends; after an exception it stays so.

    Args:
        out: The folder, which this process holds.
        anew: If True, what a killed process has left is removed first; else only what it has left
            half written.
    """
    state = out / STATE_FOLDER
    state.mkdir(exist_ok=True)
    flush_folder(out)
    remove_partial(out)
    if anew:
        _clear(out)
    try:
        yield
    except BaseException:
        if _names(out) == {STATE_FOLDER} and not any(state.iterdir()):
            state.rmdir()
        raise
    remove_folder(state)


def discard_after_last_snapshot(out: Path) -> int | None:
    """Removes from a run folder the steps that were taken after its last state.

    Args:
        out: A run folder that `require_startable` let pass.

    Returns:
        The number of steps, of all stages, that need not be taken again; None where there is no
        state.
    """
    from adamerge_jax.learning.snapshots import last_step

    stages = map(last_step, (out / STATE_FOLDER).glob("*"))
    steps = [step for step in stages if step is not None]
    metrics = out / METRICS_FILE
    if metrics.is_file():
        with metrics.open("rb") as file:
            # A stage has one line for its start and one for every step.
            lines = b"".join(file.readline() for _ in range(sum(steps) + len(steps)))
        write_whole(metrics, lines)
    return sum(steps) if steps else None


def _names(out: Path) -> set[str]:
    """Returns the names in a folder, but for the lock and what is half written."""
    if not out.is_dir():
        return set()
    return {path.name for path in out.iterdir() if path.name != LOCK_FILE and not is_partial(path)}


def _clear(out: Path) -> None:
    """Removes all but the lock and the mark of an unfinished run."""
    for name in _names(out) - {STATE_FOLDER}:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink()


def _not_empty(out: Path) -> InputError:
    return InputError(f"{out} is not empty; choose another folder, or remove it first")


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
