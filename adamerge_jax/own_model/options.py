"""The keywords of `merge` as a recipe: the same fields, presets, checks and registries."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from adamerge_jax.coefficients.file import IN_MEMORY
from adamerge_jax.data.arrays import ArrayExamples
from adamerge_jax.errors import InputError
from adamerge_jax.own_model.leaves import Leaves
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.recipes.presets import DEFAULT_PRESET, PRESETS
from adamerge_jax.recipes.schema import Recipe

_FIELDS = {
    "granularity": "coefficients.granularity",
    "granularity_options": "coefficients.granularity_options",
    "constraint": "coefficients.constraint",
    "initial": "coefficients.initial",
    "start": "coefficients.start",
    "objectives": "objectives",
    "regularizers": "regularizers",
    "interference": "interference",
    "heads": "heads",
    "keep_from_base": "keep_from_base",
    "steps": "learning.steps",
    "batch_size": "learning.batch_size",
    "held_out": "learning.held_out",
    "learning_rate": "learning.optimizer.learning_rate",
    "optimizer": "learning.optimizer.name",
}
"""The fields of a recipe that have a keyword."""

_CHOICES = ("objectives", "regularizers", "interference")
"""The fields that are lists of choices, each with a name and options."""

_SECTIONS = (
    "coefficients",
    "objectives",
    "regularizers",
    "interference",
    "heads",
    "keep_from_base",
    "learning",
)
"""The fields of a recipe that are not of checkpoints and their data."""


def make_recipe(
    base: Leaves[Any],
    examples: Mapping[str, ArrayExamples],
    has_test: bool,
    preset: str,
    seed: int,
    recipe: Mapping[str, Any],
    keywords: Mapping[str, Any],
) -> Recipe:
    """Returns the recipe that keywords describe.

    Args:
        base: The base, whose kernels decide on the granularity that the preset leaves open.
        examples: The examples by task.
        has_test: True where there are test examples, too.
        preset: The preset that fills in what is not given.
        seed: The seed of all randomness.
        recipe: Further fields of a recipe, for which there is no keyword.
        keywords: Fields of a recipe by their keywords; None where they are not given.

    Raises:
        InputError: A field is unknown or wrong, or does not go with a model in memory.
    """
    fields = _given(recipe)
    for keyword, value in keywords.items():
        if value is not None:
            _set(fields, _FIELDS[keyword], _as_field(keyword, value))
    coefficients = fields.setdefault("coefficients", {})
    if coefficients.get("granularity", _granularity_of(preset)) == "auto":
        coefficients |= _of_output_units(base)
    tasks = {
        task: {
            "expert": IN_MEMORY,
            "calibration": {"path": IN_MEMORY}
            | ({} if of_task.labels is None else {"label": "labels"}),
            "test": {"path": IN_MEMORY, "label": "labels"} if has_test else None,
        }
        for task, of_task in examples.items()
    }
    whole = {"base": IN_MEMORY, "tasks": tasks, "name": "merge", "retain": None} | fields
    parsed = parse_recipe(whole | {"preset": preset, "seed": seed}, where="merge", allow_code=True)
    _require_possible(parsed, fields)
    return parsed


def _given(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the further fields, one level deep copied, or refuses those of checkpoints."""
    for name in recipe:
        if name not in _SECTIONS:
            raise InputError(
                f"merge: recipe has {name!r}, expected some of {', '.join(_SECTIONS)}; what is "
                "left are fields of checkpoints, or keywords of merge"
            )
    return {
        name: {**value} if isinstance(value, Mapping) else value for name, value in recipe.items()
    }


def _set(fields: dict[str, Any], path: str, value: Any) -> None:
    *sections, last = path.split(".")
    for section in sections:
        fields[section] = {**fields.get(section, {})}
        fields = fields[section]
    fields[last] = value


def _as_field(keyword: str, value: Any) -> Any:
    """Returns a keyword's value as YAML would have it: choices are a list of names and options."""
    if keyword == "keep_from_base":
        return list(value)
    if keyword not in _CHOICES:
        return value
    choices: Sequence[Any] = [value] if isinstance(value, str | Mapping) else value
    return [{"name": one} if isinstance(one, str) else one for one in choices]


def _granularity_of(preset: str) -> str | None:
    fields = PRESETS.get(preset, PRESETS[DEFAULT_PRESET])
    return fields.get("coefficients", {}).get("granularity")


def _of_output_units(base: Leaves[Any]) -> dict[str, Any]:
    """Returns the granularity with a coefficient for each output unit of most matrices.

    These are rows of what is called `weight`, as in Equinox and PyTorch, and the last axis of
    all others, as of Flax's kernels.
    """
    sizes = {True: 0, False: 0}
    for name, array in base.parameters.items():
        if array.ndim > 1:
            sizes[name.rpartition(".")[2] == "weight"] += prod(array.shape)
    if sizes[True] > sizes[False]:
        return {"granularity": "row"}
    return {"granularity": "column", "granularity_options": {"axis": -1}}


def _require_possible(recipe: Recipe, given: Mapping[str, Any]) -> None:
    """Refuses what only checkpoints can have, where it is asked for by name.

    Raises:
        InputError: Names the field.
    """
    if recipe.coefficients.initial_merge is not None:
        raise InputError(
            "merge: coefficients.initial_merge is for checkpoints; leave it out, or make the merge "
            "with the base's and the experts' files"
        )
    if given.get("learning", {}).get("copies"):
        raise InputError(
            "merge: learning.copies changes images and texts, which arrays need not be; leave it "
            "out, and give data that is changed already"
        )
    if recipe.heads.kind in ("scaled", "refitted"):
        raise InputError(
            f"merge: heads are to be {recipe.heads.kind}, which asks for the features before them; "
            "take learned or kept"
        )
