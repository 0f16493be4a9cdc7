"""The presets: published ways of learning coefficients, each a fragment of a recipe in this folder.

The fields of a recipe take precedence over those of its preset.
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
"""The fragments of recipes by name."""

_OPTIONS_OF = {
    "granularity": "granularity_options",
    "constraint": "initial",
    "initial_merge": "initial",
    "name": "options",
    "schedule": "schedule_options",
}
"""The fields that hold a choice, and the field beside each that holds the options of the choice."""


def apply_preset(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a recipe, completed by those of its preset.

    See `complete`.

    Raises:
        InputError: There is no such preset.
    """
    name = fields.get("preset", DEFAULT_PRESET)
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError(f"preset: found {name!r:.80}; expected one of {', '.join(PRESETS)}")
    return complete(fields, PRESETS[name])


def complete(fields: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a recipe or a section, completed by others that count less.

    Sections are completed field by field; a list is taken as a whole. Options of a choice, such as
    those of a granularity, are left out if the fields choose another.
    """
    filled = copy.deepcopy(dict(others))
    for choice, options in _OPTIONS_OF.items():
        if choice in fields and fields[choice] != others.get(choice):
            filled.pop(options, None)
    for key, value in fields.items():
        if isinstance(value, Mapping) and isinstance(filled.get(key), Mapping):
            filled[key] = complete(value, filled[key])
        else:
            filled[key] = value
    return filled


def drop_options_of_replaced(
    fields: Mapping[str, Any], before: Mapping[str, Any], changed: Collection[str], path: str = ""
) -> dict[str, Any]:
    """Returns the fields without the options of choices that were replaced.

    Args:
        fields: The fields of a recipe or of a section.
        before: The fields before some were changed.
        changed: The dotted paths of the changed fields; options among them stay.
        path: The path of the fields in the recipe, with a dot behind it.
    """
    remaining = dict(fields)
    for choice, options in _OPTIONS_OF.items():
        replaced = choice in before and fields[choice] != before[choice]
        if replaced and path + options not in changed:
            remaining.pop(options, None)
    for key, value in remaining.items():
        if isinstance(value, Mapping) and isinstance(before.get(key), Mapping):
            remaining[key] = drop_options_of_replaced(value, before[key], changed, f"{path}{key}.")
    return remaining
