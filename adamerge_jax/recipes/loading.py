"""Reads recipes from YAML files and nested dictionaries; reports mistakes in one line."""

import difflib
import re
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from adamerge_jax.errors import InputError
from adamerge_jax.recipes.checks import check
from adamerge_jax.recipes.presets import apply_preset
from adamerge_jax.recipes.schema import Recipe


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as in YAML 1.2; in YAML 1.1 it is a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(text: str | bytes) -> Any:
    """Parses YAML.

    Args:
        text: The YAML document.

    Returns:
        Its dictionaries, lists, strings and numbers.

    Raises:
        InputError: It is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"not valid YAML ({' '.join(str(error).split())})") from error


def load_recipe(path: Path | str, preset: str | None = None) -> Recipe:
    """Reads and validates a recipe.

    Args:
        path: A YAML file.
        preset: Replaces the preset that the file names.

    Raises:
        InputError: The file is missing, is not YAML, or a field is unknown, missing or wrong.

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
        ('reviews', 'recommended', 'row')
    """
    chosen = {} if preset is None else {"preset": preset}
    file = Path(path)
    return parse_recipe({"name": file.stem} | read_fields(file) | chosen, str(path))


def read_fields(path: Path) -> dict[str, Any]:
    """Reads the fields of a recipe file without validating them.

    Raises:
        InputError: The file is missing or holds no YAML mapping.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such recipe; expected a YAML file")
    try:
        fields = read_yaml(path.read_bytes())
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: expected fields such as base and tasks, found {fields!r}")
    return fields


def parse_recipe(fields: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validates a recipe given as nested dictionaries.

    Args:
        fields: The contents of a recipe's YAML file.
        where: The beginning of error messages.

    Raises:
        InputError: A field is unknown, missing or wrong.

    Examples:
        >>> from adamerge_jax import InputError, parse_recipe
        >>> fields = {
        ...     "base": "google-bert/bert-base-uncased",
        ...     "tasks": {"law": {"expert": "experts/law", "calibration": "data/law.jsonl"}},
        ... }
        >>> parse_recipe(fields).learning.steps
        100
        >>> try:
        ...     parse_recipe(fields | {"lerning": {"steps": 10}})
        ... except InputError as error:
        ...     print(error)
        recipe: unknown field lerning; nearest valid name is 'learning'
    """
    try:
        recipe = Recipe.model_validate(apply_preset(fields))
        check(recipe)
    except ValidationError as error:
        raise InputError(f"{where}: {describe_validation_error(error)}") from error
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return recipe


def describe_validation_error(error: ValidationError) -> str:
    """Returns the first mistake in one line: the field, its value and the expected value."""
    mistake = error.errors()[0]
    field = ".".join(map(str, mistake["loc"]))
    if mistake["type"] == "extra_forbidden":
        *section, unknown = mistake["loc"]
        valid_names = _fields_at(section)
        nearest = difflib.get_close_matches(str(unknown), valid_names, n=1, cutoff=0.0)
        message = f"unknown field {field}; nearest valid name is {nearest[0]!r}"
    elif mistake["type"] == "missing":
        message = f"field {field} is missing"
    elif mistake["type"] == "value_error":
        message = str(mistake["ctx"]["error"])
    else:
        message = f"field {field}: found {mistake['input']!r}; {mistake['msg']}"
    others = error.error_count() - 1
    return message + (f" (and {others} more)" if others else "")


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
