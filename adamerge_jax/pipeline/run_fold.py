"""The command `fold`: from a coefficients file to a checkpoint."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from adamerge_jax.checkpoints.folders import require_space
from adamerge_jax.data.tokenizers import tokenizer_owner
from adamerge_jax.devices import Devices, is_first_process, open_devices, wait_for_all
from adamerge_jax.pipeline.account import account
from adamerge_jax.pipeline.export import EXPORT_FOLDERS, export, export_bytes
from adamerge_jax.pipeline.export_job import export_job
from adamerge_jax.pipeline.match import prepare_fold
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.pipeline.printing import print_lines, print_notes
from adamerge_jax.pipeline.processes import by_first_process, silence_others
from adamerge_jax.pipeline.provenance import hub_datasets
from adamerge_jax.recipes.schema import Recipe
from adamerge_jax.runs.files import COEFFICIENTS_FILE
from adamerge_jax.runs.lock import hold
from adamerge_jax.runs.resuming import require_new_export, unfinished


def fold_file(
    file: Path,
    recipe: Recipe,
    *,
    root: Path,
    out: Path,
    console: Console,
    scale: Mapping[str, float] | None = None,
    allow_other_models: bool = False,
) -> None:
    """Exports a merge from learned coefficients, without learning.

    Args:
        file: The coefficients file.
        recipe: The recipe with base and experts, in any order, and the settings of the export.
        root: Folder that relative paths of the recipe start from.
        out: The folder to make; it gets what `export` writes, and where experts are scaled the
            coefficients that were folded.
        console: The console that shows progress.
        scale: The factor of each expert's coefficients; 0 leaves the expert out, with the model of
            its task.
        allow_other_models: If True, models that the file was not learned for are folded too.

    Raises:
        InputError: The file cannot be read, was learned for other models, or is no adapter; or the
            folder is in use.
        Stopped: A signal came, where signals are looked at; see `stop_on_signals`.
    """
    devices, out = open_devices(**recipe.devices.model_dump()), out.expanduser()
    with by_first_process(hold(out)):
        _fold_file(
            file, recipe, devices, root, out, silence_others(console), scale, allow_other_models
        )


def _fold_file(
    file: Path,
    recipe: Recipe,
    devices: Devices,
    root: Path,
    out: Path,
    console: Console,
    scale: Mapping[str, float] | None,
    allow_other_models: bool,
) -> None:
    """Checks all input of a fold, then exports to a folder that this process holds."""
    require_new_export(out, EXPORT_FOLDERS)
    coefficients, models, notes = prepare_fold(
        file,
        dataclasses.replace(open_models(recipe.to_fold, root, to_run=False), devices=devices),
        scale=scale,
        allow_other_models=allow_other_models,
    )
    tokenizer_owner(models.by_name, recipe.tokenizer)  # refused before anything is written
    require_space(out, export_bytes(models, recipe.export))
    print_notes(notes, console)
    account_lines = account(models, coefficients.parameters)
    print_lines(account_lines, console)
    wait_for_all("checked")
    job = export_job(
        models,
        coefficients,
        recipe.export,
        root,
        account_lines,
        tokenizer=recipe.tokenizer,
        datasets=hub_datasets(recipe.calibration_sources, root),
    )
    with by_first_process(unfinished(out, anew=True)):
        export(job, out, console)
        if scale and is_first_process():
            coefficients.save(out / COEFFICIENTS_FILE)
