"""The command `coarsen`: from a coefficients file to one of fewer coefficients."""

from pathlib import Path

from rich.console import Console

from adamerge_jax.errors import InputError
from adamerge_jax.pipeline.coarsen import Coarse, Coarsened, coarsen
from adamerge_jax.pipeline.match import prepare_fold
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.pipeline.printing import print_notes
from adamerge_jax.recipes.schema import Recipe


def coarsen_file(
    file: Path, recipe: Recipe, to: Coarse, *, root: Path, out: Path, console: Console
) -> Coarsened:
    """Writes a coefficients file of fewer coefficients, whose merge is nearest to that of a file.

    Args:
        file: The coefficients file, or its run folder.
        recipe: The recipe with base and experts.
        to: The granularity of the new file.
        root: Folder that relative paths of the recipe start from.
        out: The file to make.
        console: The console that shows notes.

    Raises:
        InputError: The file cannot be read or was learned for other models, or `out` is there
            already or cannot be written.
    """
    out = out.expanduser()
    if out.exists() or not out.parent.is_dir():
        raise InputError(f"--out {out}: expected a new file in a folder that exists")
    coefficients, models, notes = prepare_fold(
        file, open_models(recipe.to_fold, root, to_run=False)
    )
    print_notes(notes, console)
    with console.status("reading task vectors"):
        coarsened = coarsen(models, coefficients, to)
    coarsened.coefficients.save(out)
    return coarsened
