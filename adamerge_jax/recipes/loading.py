"""Reads recipes from YAML files and nested dictionaries; reports mistakes in one line."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from adamerge_jax.errors import InputError, and_more, shorten
from adamerge_jax.files.strict_yaml import read_yaml_file
from adamerge_jax.recipes.checks import check
from adamerge_jax.recipes.presets import apply_preset, complete
from adamerge_jax.recipes.schema import AUTO, AUTOMATIC_FIELDS, PICKED_WITH_THEM, Recipe
from adamerge_jax.registry import allow_code, require_allowed

_MOST_MISTAKES = 8
"""The number of mistakes that one message tells."""


def load_recipe(
    path: Path | str,
    preset: str | None = None,
    changes: Mapping[str, Any] | None = None,
    *,
    allow_code: bool = False,
) -> Recipe:
    """Reads and validates a recipe.

    Args:
        path: A YAML file.
        preset: Replaces the preset that the file names.
        changes: Fields in place of the file's, whose others stay: `{"learning": {"steps": 20}}` has
            another number of steps alone. Tasks and lists are taken as a whole; where a choice
            changes, such as the granularity, the file's options of it go.
        allow_code: If True, the functions of somebody's own that the recipe names
            (`package.module:function`) may be imported when a run needs them.

    Raises:
        InputError: The file is missing, is not YAML, a field is unknown, missing or wrong, or it
            names code that is not allowed.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from adamerge_jax import load_recipe
        >>> text = '''
        ... base: google-bert/bert-base-uncased
        ... tasks:
        ...   sentiment: {expert: experts/sentiment, calibration: data/sentiment.jsonl}
        ... '''
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "reviews.yaml"
        ...     _ = file.write_text(text)
        ...     recipe = load_recipe(file)
        >>> recipe.name, recipe.preset, recipe.coefficients.granularity
        ('reviews', 'recommended', 'auto')
    """
    recipe = read_recipe(path, preset, changes)
    _admit_code(recipe, str(path), allow_code)
    return recipe


def read_recipe(
    path: Path | str, preset: str | None = None, changes: Mapping[str, Any] | None = None
) -> Recipe:
    """Reads and validates a recipe as `load_recipe` does, and leaves aside the code that it names.

    Args:
        path: A YAML file.
        preset: Replaces the preset that the file names.
        changes: Fields in place of the file's; see `load_recipe`.

    Raises:
        InputError: The file is missing, is not YAML, or a field is unknown, missing or wrong.
    """
    chosen = {} if preset is None else {"preset": preset}
    file = Path(path)
    fields = {"name": file.stem} | read_fields(file)
    if changes:
        tasks = changes.get("tasks", fields.get("tasks"))
        fields = complete(changes, fields) | ({} if tasks is None else {"tasks": tasks})
    return _validate(fields | chosen, str(path))


def read_fields(path: Path) -> dict[str, Any]:
    """Reads the fields of a recipe file without validating them.

    Raises:
        InputError: The file is missing or holds no YAML mapping.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such recipe; expected a YAML file")
    fields = read_yaml_file(path)
    if not isinstance(fields, dict):
        raise InputError(
            f"{path}: expected fields such as base and tasks, found {shorten(repr(fields))}"
        )
    return fields


def parse_recipe(
    fields: dict[str, Any],
    where: str = "recipe",
    *,
    allow_code: bool = False,
    left_open: Mapping[str, bool] | None = None,
) -> Recipe:
    """Validates a recipe given as nested dictionaries.

    Args:
        fields: The contents of a recipe's YAML file.
        where: The beginning of error messages.
        allow_code: If True, the functions of somebody's own that the recipe names
            (`package.module:function`) may be imported when a run needs them.
        left_open: Fields that a run may pick although they are there: those of a recipe that these
            fields come from, see `Recipe.left_open`.

    Raises:
        InputError: A field is unknown, missing or wrong, or names code that is not allowed.

    Examples:
        >>> from adamerge_jax import InputError, parse_recipe
        >>> fields = {
        ...     "base": "google-bert/bert-base-uncased",
        ...     "tasks": {"law": {"expert": "experts/law", "calibration": "data/law.jsonl"}},
        ... }
        >>> parse_recipe(fields).learning.steps
        200
        >>> try:
        ...     parse_recipe(fields | {"lerning": {"steps": 10}})
        ... except InputError as error:
        ...     print(error)
        recipe: unknown field lerning; nearest valid name is 'learning'
    """
    recipe = _validate(fields, where, left_open or {})
    _admit_code(recipe, where, allow_code)
    return recipe


def _validate(
    fields: dict[str, Any], where: str, left_open: Mapping[str, bool] | None = None
) -> Recipe:
    fields, found_open = _without_auto(fields)
    try:
        recipe = Recipe.model_validate(apply_preset(fields))
        recipe._left_open = {**(left_open or {}), **found_open}
        check(recipe)
    except ValidationError as error:
        raise InputError(f"{where}: {describe_validation_error(error)}") from error
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return recipe


def _without_auto(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    """Takes out fields that are `auto`: they begin with the preset's value or the default.

    Returns:
        The other fields, and `Recipe.left_open`.
    """
    others, left_open = dict(fields), {}
    for path in (*AUTOMATIC_FIELDS, *PICKED_WITH_THEM):
        section, _, name = path.partition(".")
        given = others.get(section, {})
        if not isinstance(given, Mapping):
            continue  # refused with all else that is wrong
        if name not in given:
            left_open[path] = False
        elif given[name] == AUTO and path in AUTOMATIC_FIELDS:
            left_open[path] = True
            others[section] = {key: value for key, value in given.items() if key != name}
    return others, left_open


def _admit_code(recipe: Recipe, where: str, allowed: bool) -> None:
    """Allows the functions of somebody's own that a recipe names, or refuses them."""
    if allowed:
        allow_code(recipe.own_code.values())
    for field, name in recipe.own_code.items():
        require_allowed(f"{where}: {field}", name)


def describe_validation_error(error: ValidationError) -> str:
    """Returns all mistakes in one line: the field, its value and the expected value of each.

    Unknown fields come first: a misspelt one is missing under its right name too.
    """
    mistakes = sorted(error.errors(), key=lambda mistake: mistake["type"] != "extra_forbidden")
    told = [_describe_mistake(mistake) for mistake in mistakes[:_MOST_MISTAKES]]
    return "; ".join(told) + and_more(len(mistakes) - len(told))


def _describe_mistake(mistake: Any) -> str:
    # Of a union pydantic names the type that it tried, such as `function-before[...]`.
    field = ".".join(str(part) for part in mistake["loc"] if "[" not in str(part))
    if mistake["type"] == "extra_forbidden":
        *section, unknown = mistake["loc"]
        valid_names = _fields_at(section)
        nearest = difflib.get_close_matches(str(unknown), valid_names, n=1, cutoff=0.0)
        return f"unknown field {shorten(field)}; nearest valid name is {nearest[0]!r}"
    if mistake["type"] == "missing":
        return f"field {field} is missing"
    if mistake["type"] == "value_error":
        return f"field {shorten(field)}: {mistake['ctx']['error']}"
    message = f"field {shorten(field)}: found {shorten(repr(mistake['input']))}; {mistake['msg']}"
    if mistake["type"] == "string_type" and isinstance(mistake["input"], bool | int | float):
        message += ": put it in quotes"
    return message


def _fields_at(location: list[str | int]) -> list[str]:
    """Returns the names of the fields of the section at a location of the recipe."""
    section: type[BaseModel] = Recipe
    steps = iter(location)
    for step in steps:
        annotation = section.model_fields[step].annotation
        if get_origin(annotation) in (dict, list):
            next(steps)  # the key or the position
        candidates = [annotation, *get_args(annotation)]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)
