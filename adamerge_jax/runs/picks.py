"""The fields of a recipe that a run has picked for itself, which its record keeps."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from adamerge_jax.files.json_object import read_object_if_there
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.recipes.schema import Recipe
from adamerge_jax.runs.files import RECORD_FILE


class Picks(NamedTuple):
    """The values that a run has picked.

    Attributes:
        fields: The values by the dotted path of the field.
        line: What was picked and why, for the console; empty for nothing.
    """

    fields: Mapping[str, Any]
    line: str = ""

    def applied_to(self, recipe: Recipe) -> Recipe:
        """Returns the recipe with these values.

        Raises:
            InputError: The recipe's other fields do not go with one.
        """
        if not self.fields:
            return recipe
        sections = recipe.model_dump()
        for field, value in self.fields.items():
            section, _, name = field.partition(".")
            sections[section][name] = value
        return parse_recipe(sections)


NO_PICKS = Picks({})

PickFields = Callable[[Recipe, Path, Callable[[str], Any]], Picks]
"""`(recipe, root, report) -> picks` for the fields that a recipe leaves open."""


def picks_of_run(recipe: Recipe, out: Path) -> Picks | None:
    """Returns what an earlier start of a run has picked; None where its record does not say.

    Args:
        recipe: The recipe; fields that it does not leave open are its own.
        out: The run folder.

    Raises:
        InputError: The record cannot be read.
    """
    picked = read_object_if_there(out / RECORD_FILE).get("picked")
    if not isinstance(picked, dict):
        return None
    return Picks({field: value for field, value in picked.items() if field in recipe.left_open})
