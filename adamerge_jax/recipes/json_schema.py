"""The JSON schema of recipes, with which editors complete fields and mark mistakes.

It says of a recipe file, without its preset, which fields and values it may have. What depends on
several fields, or on models and data, it does not say; `adamerge plan` does.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from adamerge_jax.coefficients.granularities import GRANULARITIES
from adamerge_jax.coefficients.importance import FROM_COARSE
from adamerge_jax.interference import STEPS
from adamerge_jax.methods import METHODS
from adamerge_jax.objectives import OBJECTIVES
from adamerge_jax.objectives.regularizers import REGULARIZERS
from adamerge_jax.recipes.presets import PRESETS
from adamerge_jax.recipes.schema import (
    SHORTHANDS,
    SWITCHED_OFF,
    CoefficientsRecipe,
    InterferenceRecipe,
    MethodRecipe,
    ObjectiveRecipe,
    Recipe,
    RegularizerRecipe,
)

_DIALECT = "https://json-schema.org/draft/2020-12/schema"

_OWN_CODE = r"^[^:]+:[^:]+$"
"""The pattern of names of a user's own functions, package.module:function."""

_CHOICES: Mapping[tuple[type[BaseModel], str], Iterable[str]] = {
    (CoefficientsRecipe, "granularity"): ("auto", *GRANULARITIES, *FROM_COARSE),
    (InterferenceRecipe, "name"): STEPS,
    (MethodRecipe, "name"): METHODS,
    (ObjectiveRecipe, "name"): OBJECTIVES,
    (RegularizerRecipe, "name"): REGULARIZERS,
}
"""The fields that name a choice of a registry, or a function of the user's own."""

_LIMITS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}
"""The words of JSON schema for pydantic's, which leaves them behind a validator."""


def recipe_schema() -> dict[str, Any]:
    """Returns the JSON schema of recipe files, in the dialect 2020-12."""
    schema = Recipe.model_json_schema()
    definitions = schema.pop("$defs")
    for section in dict.fromkeys(sections(Recipe)):
        fields = schema if section is Recipe else definitions[section.__name__]
        for name, field in section.model_fields.items():
            if SWITCHED_OFF in field.metadata:
                fields["properties"][name]["anyOf"].append({"const": "none"})
            if (section, name) in _CHOICES:
                names = sorted(_CHOICES[section, name])
                fields["properties"][name]["anyOf"] = [{"enum": names}, {"pattern": _OWN_CODE}]
        for shorthand, field_name in SHORTHANDS.items():
            if issubclass(section, shorthand):
                alone = fields["properties"][field_name]
                definitions[section.__name__] = {"anyOf": [alone, fields]}
    schema["properties"]["preset"]["enum"] = sorted(PRESETS)
    # A preset brings the others.
    schema["required"] = ["base", "tasks"]
    schema |= {"title": "Recipe of adamerge_jax", "description": Recipe.__doc__.split("\n")[0]}
    return _with_limits({"$schema": _DIALECT, **schema, "$defs": definitions})


def _with_limits(schema: Any) -> Any:
    """Returns a schema with the limits of numbers in its own words."""
    if isinstance(schema, list):
        return [_with_limits(member) for member in schema]
    if not isinstance(schema, dict):
        return schema
    is_number = schema.get("type") in ("number", "integer")
    return {
        _LIMITS.get(key, key) if is_number else key: _with_limits(value)
        for key, value in schema.items()
    }


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yields the sections of a recipe within a type, at any depth."""
    for part in get_args(annotation):
        yield from sections(part)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from sections(field.annotation)
