"""Fields of a recipe that a run picks before it starts, so that it fits the device's memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from adamerge_jax.checkpoints.folders import readable_size
from adamerge_jax.errors import InputError
from adamerge_jax.plan.advice import Target, advise
from adamerge_jax.plan.hardware import find_device, resident_bytes
from adamerge_jax.plan.memory import programs_of
from adamerge_jax.plan.outline import outline
from adamerge_jax.recipes.schema import AUTOMATIC_FIELDS, Recipe
from adamerge_jax.runs.picks import NO_PICKS, Picks


def pick_fields(
    recipe: Recipe, root: Path, report: Callable[[str], Any] = lambda line: None
) -> Picks:
    """Picks the fields that a recipe leaves open, with the plan's search for what fits.

    They are those of `AUTOMATIC_FIELDS` that are `auto`, and on an accelerator those that the
    recipe does not name, too. Where the run fits with their defaults, these are picked. Nothing is
    opened where nothing is to be picked.

    Args:
        recipe: The recipe.
        root: Folder that its relative paths start from.
        report: Shows what is looked at.

    Raises:
        InputError: A checkpoint or a file cannot be used; or a field is `auto`, and nothing is
            known of the device.
    """
    on_accelerator = jax.default_backend() != "cpu"
    asked = [field for field in AUTOMATIC_FIELDS if recipe.left_open.get(field)]
    unnamed = [field for field in recipe.left_open if not recipe.left_open[field]]
    fields = [f for f in AUTOMATIC_FIELDS if f in asked or (on_accelerator and f in unnamed)]
    if not fields:
        return NO_PICKS
    try:
        device = find_device(None)
    except InputError as error:
        if asked:
            raise InputError(f"{asked[0]}: is auto, and {error}; or give it a value") from error
        return Picks({}, f"nothing is picked to fit the device's memory: {error}")
    report("opening checkpoints and data")
    merge = outline(recipe, root)
    devices = 1 if device.is_cpu else jax.device_count()
    target = Target(device, resident_bytes(), devices, 1 if device.is_cpu else recipe.devices.model)
    report("tracing the step")
    programs = programs_of(merge, merge.learning(), compiled=False, is_cpu=device.is_cpu)
    peak, fits = target.peak(target.memory(merge, programs)), True
    picked = {field: _value(recipe, field) for field in fields}
    if peak > device.memory:
        may_change = {*fields, *unnamed} - ({"task_vectors.memory"} if devices > 1 else set())
        if not on_accelerator:
            may_change -= {*AUTOMATIC_FIELDS} - {*asked}
        changes = advise(merge, target, programs, report, may_change)
        picked |= {change.field: change.value for change in changes}
        peak, fits = (changes[-1].peak, changes[-1].fits) if changes else (peak, False)
    in_words = ", ".join(f"{field}: {value}" for field, value in picked.items())
    of_memory = f"{readable_size(peak)} of {readable_size(device.memory)} on {device.name}"
    line = f"picked by the plan: {in_words}; predicted peak {of_memory}"
    if not fits:
        line += ", which does not fit; adamerge plan names further changes"
    return Picks(picked, line)


def _value(recipe: Recipe, field: str) -> Any:
    section, _, name = field.partition(".")
    return getattr(getattr(recipe, section), name)
