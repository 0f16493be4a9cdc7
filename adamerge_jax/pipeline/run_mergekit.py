"""The command `mergekit`: from a coefficients file to mergekit's file."""

from pathlib import Path

from rich.console import Console

from adamerge_jax.pipeline.export import export_mergekit
from adamerge_jax.pipeline.match import prepare_fold
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.pipeline.printing import print_notes
from adamerge_jax.recipes.schema import Recipe


def write_mergekit(file: Path, recipe: Recipe, *, root: Path, out: Path, console: Console) -> None:
    """Writes the YAML file with which mergekit makes the merge of learned coefficients.

    Args:
        file: The coefficients file.
        recipe: The recipe with base and experts, and the merge's dtype.
        root: Folder that relative paths of the recipe start from.
        out: The file to make.
        console: The console that shows notes.

    Raises:
        InputError: The file cannot be read, was learned for other models, or is of a merge that
            mergekit cannot make.
    """
    coefficients, models, notes = prepare_fold(
        file, open_models(recipe.to_fold, root, to_run=False)
    )
    export_mergekit(models, coefficients, out.expanduser(), recipe.export.dtype)
    print_notes(notes, console)
