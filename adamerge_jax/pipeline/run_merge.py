"""The command `merge`: from base and experts to a checkpoint, by a method."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from adamerge_jax.checkpoints.config_file import classes_of
from adamerge_jax.checkpoints.folders import require_space
from adamerge_jax.checkpoints.matching import MatchedCheckpoint
from adamerge_jax.data.tokenizers import tokenizer_owner
from adamerge_jax.devices import Devices, is_first_process, open_devices, wait_for_all
from adamerge_jax.errors import InputError
from adamerge_jax.evaluation.harness import require_harness
from adamerge_jax.methods import make_method
from adamerge_jax.parameter_names import is_batch_statistic
from adamerge_jax.pipeline.account import account
from adamerge_jax.pipeline.export import (
    CHECKPOINT_FOLDER,
    EXPORT_FOLDERS,
    MergeFacts,
    export,
    export_bytes,
    require_exportable,
    write_card,
)
from adamerge_jax.pipeline.export_job import export_job
from adamerge_jax.pipeline.harness_rows import harness_results, open_harness
from adamerge_jax.pipeline.initial_merge import (
    coefficients_of_method,
    fit_initial_merge,
    merged_names,
    stored_tensors,
)
from adamerge_jax.pipeline.merge import merge_from_data
from adamerge_jax.pipeline.models import Models, open_models
from adamerge_jax.pipeline.printing import print_lines, print_results
from adamerge_jax.pipeline.processes import by_first_process, silence_others
from adamerge_jax.pipeline.workspace import open_workspace
from adamerge_jax.recipes.problems import require_no_predictions
from adamerge_jax.recipes.schema import Recipe
from adamerge_jax.runs.counting import count_on
from adamerge_jax.runs.files import COEFFICIENTS_FILE, RESULTS_FILE
from adamerge_jax.runs.lock import hold
from adamerge_jax.runs.results import Results, write_results
from adamerge_jax.runs.resuming import require_new_export, unfinished
from adamerge_jax.task_vectors.offload.memory import make_memory


def merge(
    recipe: Recipe,
    method: str,
    options: Mapping[str, Any],
    *,
    root: Path,
    out: Path,
    console: Console,
) -> None:
    """Exports a merge by a method that learns nothing, with a coefficients file that repeats it.

    Base and experts are read tensor by tensor; methods with interference steps read all task
    vectors first. Methods that need calibration data hold the base, all task vectors (in the
    memory that the recipe's `task_vectors` says) and the merge.

    Args:
        recipe: The recipe with base and experts, the tensors that are kept from the base, and the
            settings of the export. Its data is read for methods that need it.
        method: Name of the method; see `adamerge_jax.methods`.
        options: Arguments of the method.
        root: Folder that relative paths of the recipe start from.
        out: The folder to make.
        console: The console that shows progress.

    Raises:
        InputError: There is no such method, it refuses an option, or a model cannot be used; or the
            folder is in use.
        Stopped: A signal came, where signals are looked at; see `stop_on_signals`.
    """
    make_method(method, options)  # refused before the folder is held
    devices, out = open_devices(**recipe.devices.model_dump()), out.expanduser()
    with by_first_process(hold(out)):
        _merge(recipe, method, options, devices, root, out, silence_others(console))


def _merge(
    recipe: Recipe,
    method: str,
    options: Mapping[str, Any],
    devices: Devices,
    root: Path,
    out: Path,
    console: Console,
) -> None:
    """Checks all input of a merge, then exports to a folder that this process holds."""
    require_new_export(out, EXPORT_FOLDERS)
    require_harness(recipe.evaluation.lm_eval)
    made = make_method(method, options)
    statistics: list[str] = []
    reads_data = made.needs_data
    if not reads_data:
        models = dataclasses.replace(open_models(recipe, root, to_run=False), devices=devices)
        statistics = list(filter(is_batch_statistic, merged_names(models)))
        reads_data = bool(statistics) and _can_estimate_statistics(models, recipe)
    if reads_data:
        with console.status("opening checkpoints and data"):
            workspace = open_workspace(recipe, root, devices, count_on(console))
        models = workspace.models
    require_no_predictions("method", method, made, models)
    tokenizer_owner(models.by_name, recipe.tokenizer)  # refused before anything is written
    require_space(out, export_bytes(models, recipe.export))
    initial = fit_initial_merge(models, method, options)
    coefficients = coefficients_of_method(models, initial)
    require_exportable(models, recipe.export, MergeFacts.of(coefficients), out)
    harness = open_harness(recipe.evaluation.lm_eval, recipe, models, root, console)
    account_lines = account(models, coefficients.parameters)
    if statistics:
        way = "estimated on calibration data" if reads_data else "merged like parameters"
        account_lines.append(f"{len(statistics)} statistics of batch normalisation are {way}")
    print_lines(account_lines, console)
    if reads_data:
        memory, in_words = make_memory(recipe.task_vectors.memory, devices), initial.in_words
        with console.status(in_words) as status:
            parameters = merge_from_data(
                workspace, initial, memory, lambda line: status.update(f"{in_words}: {line}")
            )
        tensors = stored_tensors(models, parameters, statistics or merged_names(models))
        coefficients = dataclasses.replace(coefficients, initial_tensors=tensors)
        del parameters
    wait_for_all("checked")
    job_of = partial(
        export_job,
        models,
        coefficients,
        recipe.export,
        root,
        account_lines,
        tokenizer=recipe.tokenizer,
    )
    with by_first_process(unfinished(out, anew=True)):
        export(job_of(), out, console)
        if is_first_process():
            coefficients.save(out / COEFFICIENTS_FILE)
    if harness is None or not is_first_process():
        return
    try:
        scores = harness_results(harness, models, out / CHECKPOINT_FOLDER, console)
    except InputError as error:
        raise InputError(
            f"{error}; the merge is in {out}: once that is mended, adamerge evaluate scores it"
        ) from error
    results = Results([], harness=scores)
    write_results(results, out / RESULTS_FILE)
    write_card(job_of(results=results), out)
    print_results(results, console)


_OF_IMAGES = "ForImageClassification"
"""The end of the names of models whose statistics of batch normalisation can be estimated."""


def _can_estimate_statistics(models: Models, recipe: Recipe) -> bool:
    """Returns True if statistics of batch normalisation can be estimated on a recipe's data."""
    has_data = len(recipe.calibration_sources) == len(recipe.tasks)
    return has_data and all(
        isinstance(expert, MatchedCheckpoint)
        and any(name.endswith(_OF_IMAGES) for name in classes_of(expert.checkpoint.config_fields))
        for expert in models.experts.values()
    )
