"""Published ways of learning coefficients by name, each a fragment of a recipe beside this file.

A recipe's own fields come before those of its preset.
"""

import copy
from collections.abc import Collection, Mapping
from importlib.resources import files
from typing import Any

import yaml

from adamerge_jax.errors import InputError

DEFAULT_PRESET = "recommended"
"""The preset of a recipe that names none."""

PRESETS: dict[str, dict[str, Any]] = {
    file.name.removesuffix(".yaml"): yaml.safe_load(file.read_text(encoding="utf-8"))
    for file in sorted(files(__name__).iterdir(), key=lambda file: file.name)
    if file.name.endswith(".yaml")
}
"""Fragments of recipes by name."""

_OPTIONS_OF = {
    "granularity": "granularity_options",
    "constraint": "initial",
    "name": "options",
    "schedule": "schedule_options",
}
"""Fields that choose something, and the field beside them that belongs to that choice."""


def apply_preset(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe, and those of its preset where it has none.

    Sections are filled up field by field; a list is taken as a whole. Where the recipe chooses
    another granularity, constraint, optimizer or schedule than the preset, what the preset says of
    it is left out.

    Raises:
        InputError: There is no such preset.
    """
    name = fields.get("preset", DEFAULT_PRESET)
    if name not in PRESETS:
        raise InputError(f"preset: found {name!r}; expected one of {', '.join(PRESETS)}")
    return _fill(dict(fields), PRESETS[name])


def drop_options_of_replaced(
    fields: Mapping[str, Any], before: Mapping[str, Any], changed: Collection[str], path: str = ""
) -> dict[str, Any]:
    """The fields, without the options of what another choice has taken the place of.

    Args:
        fields: Of a recipe.
        before: The same before some were changed.
        changed: Dotted paths of those; options that are among them are kept.
        path: Where the fields are in the recipe, with a dot behind it.
    """
    kept = dict(fields)
    for choice, options in _OPTIONS_OF.items():
        replaced = choice in before and fields[choice] != before[choice]
        if replaced and path + options not in changed:
            kept.pop(options, None)
    for key, value in kept.items():
        if isinstance(value, Mapping) and isinstance(before.get(key), Mapping):
            kept[key] = drop_options_of_replaced(value, before[key], changed, f"{path}{key}.")
    return kept


def _fill(fields: dict[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    filled = copy.deepcopy(dict(preset))
    for choice, options in _OPTIONS_OF.items():
        if choice in fields and fields[choice] != preset.get(choice):
            filled.pop(options, None)
    for key, value in fields.items():
        if isinstance(value, Mapping) and isinstance(filled.get(key), Mapping):
            filled[key] = _fill(dict(value), filled[key])
        else:
            filled[key] = value
    return filled
