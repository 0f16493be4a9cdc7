"""The end of a run: its merge is written, then compared with its baselines."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.devices import is_first_process, wait_for_all
from adamerge_jax.errors import InputError
from adamerge_jax.evaluation.harness import Harness
from adamerge_jax.pipeline.account import account
from adamerge_jax.pipeline.export import CHECKPOINT_FOLDER, export, write_card
from adamerge_jax.pipeline.export_job import export_job
from adamerge_jax.pipeline.harness_rows import harness_results
from adamerge_jax.pipeline.learn import LearningInputs
from adamerge_jax.pipeline.models import Models
from adamerge_jax.pipeline.predictions import predictions_of_run
from adamerge_jax.pipeline.printing import print_results
from adamerge_jax.pipeline.provenance import hub_datasets
from adamerge_jax.recipes.schema import Recipe
from adamerge_jax.report.coefficients import range_warning
from adamerge_jax.report.maps import draw_coefficients
from adamerge_jax.report.page import write_page
from adamerge_jax.runs.files import (
    HEAT_MAP_FILE,
    PREDICTIONS_FILE,
    RESULTS_FILE,
    WITHOUT_EXPERTS_FILE,
)
from adamerge_jax.runs.harness import HarnessResults
from adamerge_jax.runs.predictions import write_predictions
from adamerge_jax.runs.record import RunRecord
from adamerge_jax.runs.results import Results, write_results
from adamerge_jax.runs.rows import Metric, Row
from adamerge_jax.runs.without_experts import write_without_experts
from adamerge_jax.stopping import require_going_on

log = logging.getLogger(__name__)


def export_and_compare(
    recipe: Recipe,
    inputs: LearningInputs,
    coefficients: Coefficients,
    record: RunRecord,
    root: Path,
    out: Path,
    console: Console,
    *,
    rows_of: Callable[[], list[Row]],
    resume: bool,
    rows_without: Callable[[Metric], list[Row]] | None = None,
    harness: Harness | None = None,
) -> list[Row]:
    """Writes the merge of a run, then its table of results, heat map and page.

    The scores by lm-eval come last, and are added to what is written: they may need the network.

    Args:
        recipe: The recipe.
        inputs: The models and the data.
        coefficients: The coefficients of the merge.
        record: The record of the run.
        root: Folder that relative paths of the recipe start from.
        out: The run folder.
        console: The console that shows progress and results.
        rows_of: The function that evaluates the rows of the table, the merge last; it is called
            where there is test data.
        resume: If True, forms of the merge that are there are kept.
        rows_without: The function that evaluates the merge without each expert; None where that is
            not asked for.
        harness: The tasks of lm-eval that the recipe asks for, if any.

    Returns:
        The table; empty without test data.

    Raises:
        InputError: A task of lm-eval cannot be loaded, or fails; all else is written.
    """
    first = is_first_process()
    if warning := range_warning(coefficients):
        log.warning(warning)
    job_of = partial(
        export_job,
        inputs.workspace.models,
        coefficients,
        recipe.export,
        root,
        account(inputs.workspace.models, coefficients.parameters),
        tokenizer=recipe.tokenizer,
        datasets=hub_datasets(recipe.calibration_sources, root),
    )
    with record.phase("writing checkpoints"):
        export(job_of(), out, console, keep=resume)

    results = Results([])
    if inputs.workspace.data.test:
        with console.status("evaluating"), record.phase("evaluating"):
            rows = rows_of()
            without = rows_without(rows[-1].metric) if rows_without else []
        results = Results.of_rows(rows)
        if first:
            write_results(results, out / RESULTS_FILE)
            predictions = predictions_of_run(inputs.workspace, rows, recipe.tokenizer)
            if predictions:
                write_predictions(predictions, out / PREDICTIONS_FILE)
            if without:
                write_without_experts(without, out / WITHOUT_EXPERTS_FILE)
            write_card(job_of(results=results), out)
    require_going_on()
    if first:
        draw_coefficients(coefficients, out / HEAT_MAP_FILE)
        write_page(out)
    if harness is not None and first:
        with record.phase("evaluating by lm-eval"):
            scores = _harness_scores(harness, inputs.workspace.models, out, console, results)
        results = results._replace(harness=scores)
        write_results(results, out / RESULTS_FILE)
        write_card(job_of(results=results), out)
        write_page(out)
    print_results(results, console)
    wait_for_all("exported")
    return results.rows


def _harness_scores(
    harness: Harness, models: Models, out: Path, console: Console, results: Results
) -> HarnessResults:
    """Evaluates the checkpoint of a run by lm-eval; shows all other results where that fails."""
    try:
        return harness_results(harness, models, out / CHECKPOINT_FOLDER, console)
    except InputError as error:
        print_results(results, console)
        raise InputError(
            f"{error}; the merge and its other results are in {out}: once that is mended, --resume "
            "evaluates what is missing"
        ) from error
