"""The commands: from a recipe to a run folder, from coefficients to a checkpoint."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from adamerge_jax.checkpoints.architecture import require_same_architecture
from adamerge_jax.checkpoints.config_file import CONFIG_FILE
from adamerge_jax.checkpoints.folders import require_space
from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.data.tokenizers import tokenizer_owner
from adamerge_jax.devices import Devices, is_first_process, open_devices, wait_for_all
from adamerge_jax.errors import InputError, NonFiniteObjectiveError
from adamerge_jax.evaluation.harness import Harness, require_harness
from adamerge_jax.evaluation.retention import RETAINED
from adamerge_jax.files.writing import remove_folder, remove_partial, write_whole
from adamerge_jax.methods import make_method
from adamerge_jax.pipeline.account import account
from adamerge_jax.pipeline.baselines import baseline_rows, learned_row
from adamerge_jax.pipeline.coarsen import Coarse, Coarsened, coarsen
from adamerge_jax.pipeline.end_of_text import ends_in_words
from adamerge_jax.pipeline.export import (
    CHECKPOINT_FOLDER,
    EXPORT_FOLDERS,
    ExportJob,
    MergeFacts,
    export,
    export_bytes,
    export_mergekit,
    require_exportable,
    write_card,
)
from adamerge_jax.pipeline.fold import fold
from adamerge_jax.pipeline.harness_rows import harness_results, open_harness
from adamerge_jax.pipeline.heads import read_heads
from adamerge_jax.pipeline.initial_merge import (
    coefficients_of_method,
    fit_initial_merge,
    merged_names,
    stored_tensors,
)
from adamerge_jax.pipeline.learn import LearningInputs, OnStep, learn_coefficients, prepare
from adamerge_jax.pipeline.match import prepare_fold
from adamerge_jax.pipeline.merge import merge_from_data
from adamerge_jax.pipeline.models import Models, match_backbone, open_models
from adamerge_jax.pipeline.predictions import predictions_of_run
from adamerge_jax.pipeline.processes import by_first_process, silence_others
from adamerge_jax.pipeline.provenance import hub_datasets, model_origins
from adamerge_jax.pipeline.read import load_backbone
from adamerge_jax.pipeline.row_cache import RowCache
from adamerge_jax.pipeline.without_experts import rows_without_experts
from adamerge_jax.pipeline.workspace import open_workspace
from adamerge_jax.recipes.build import build
from adamerge_jax.recipes.problems import require_no_predictions
from adamerge_jax.recipes.schema import ExportRecipe, Recipe
from adamerge_jax.report.coefficients import range_warning
from adamerge_jax.report.maps import draw_coefficients
from adamerge_jax.report.model_card import model_card
from adamerge_jax.report.page import write_page
from adamerge_jax.report.results import results_table, results_tables
from adamerge_jax.runs.counting import count_on
from adamerge_jax.runs.files import (
    COEFFICIENTS_FILE,
    HEAT_MAP_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    STATE_FOLDER,
    WITHOUT_EXPERTS_FILE,
)
from adamerge_jax.runs.harness import HarnessResults
from adamerge_jax.runs.lock import hold
from adamerge_jax.runs.predictions import write_predictions
from adamerge_jax.runs.progress import show_progress
from adamerge_jax.runs.record import (
    RunRecord,
    describe_data,
    describe_machine,
    describe_tensors,
    similarity,
)
from adamerge_jax.runs.results import Results, read_results, write_results
from adamerge_jax.runs.resuming import (
    discard_after_last_snapshot,
    has_ended,
    require_new_export,
    require_startable,
    unfinished,
)
from adamerge_jax.runs.rows import Metric, Row
from adamerge_jax.runs.tracking import require_installed, track
from adamerge_jax.runs.without_experts import write_without_experts
from adamerge_jax.stopping import between_steps, require_going_on
from adamerge_jax.task_vectors.offload.memory import make_memory

log = logging.getLogger(__name__)


UNWATCHED = "general ability is not watched: there is no general text (see retain)"
"""The note of a language model's run without general text."""


class Run(NamedTuple):
    """The results of a finished run.

    Attributes:
        folder: The run folder.
        coefficients: The learned coefficients.
        rows: The table of results, the learned merge last; empty without test data.

    Examples:
        >>> import adamerge_jax as am
        >>> am.Run._fields
        ('folder', 'coefficients', 'rows')
    """

    folder: Path
    coefficients: Coefficients
    rows: list[Row]

    @property
    def table(self) -> Table | None:
        """The table of results as terminals and notebooks show it; None without test data."""
        return results_table(self.rows) if self.rows else None


def learn(recipe: Recipe, *, root: Path, out: Path, console: Console, resume: bool = False) -> Run:
    """Learns coefficients, compares the merge with its baselines and exports it.

    Args:
        recipe: The recipe.
        root: Folder that relative paths of the recipe start from.
        out: The run folder to make. Nothing is written before all input has been checked.
        console: The console that shows progress and results.
        resume: If True, the run in `out` goes on from its last state; without a state it starts
            from the beginning.

    Raises:
        InputError: The recipe, a checkpoint or data cannot be used, or `out`
            holds anything but a run of this recipe, or is in use.
        NonFiniteObjectiveError: Learning diverged; the run folder holds the last good
            coefficients.
        Stopped: A signal came, where signals are looked at; see `stop_on_signals`.
    """
    devices, out = open_devices(**recipe.devices.model_dump()), out.expanduser()
    with by_first_process(hold(out)):
        return _learn(recipe, devices, root, out, silence_others(console), resume)


def _learn(
    recipe: Recipe, devices: Devices, root: Path, out: Path, console: Console, resume: bool
) -> Run:
    """Checks all input of a run, then learns in its folder, which this process holds."""
    resolved = recipe.model_dump(mode="json")
    require_startable(out, resolved, resume=resume)
    if resume and has_ended(out, CHECKPOINT_FOLDER):
        return ended_run(out, console)
    require_installed(recipe.tracking)
    require_harness(recipe.evaluation.lm_eval)
    record = RunRecord(out)
    with console.status("opening checkpoints and data"), record.phase("opening models and data"):
        check = partial(build, recipe)
        workspace = open_workspace(recipe, root, devices, count_on(console), check)
        models = workspace.models
        method = build(recipe, models)
        require_exportable(models, recipe.export, MergeFacts.of_method(method, models), out)
    harness = open_harness(recipe.evaluation.lm_eval, recipe, models, root, console)
    with (
        console.status("reading task vectors, asking the experts") as status,
        record.phase("task vectors and the experts' answers"),
    ):
        learned = _learned_before(out) if resume else None
        inputs = prepare(method, workspace, status.update, count_on(console), asks=learned is None)
    console.print(f"{recipe.name} ({recipe.preset}): {_describe_inputs(inputs, recipe.base.path)}")
    if models.family.language and workspace.general is None:
        _print_notes([UNWATCHED], console)
    _print_notes(models.notes, console)
    if method.heads.note is not None:
        _print_notes([method.heads.note], console)
    if inputs.start is not None:
        _print_notes(inputs.start.notes, console)

    # No process writes before all have checked.
    wait_for_all("checked")
    with by_first_process(unfinished(out, anew=not resume)):
        return _learn_and_export(
            recipe, inputs, record, root, out, console, resume, learned, harness
        )


def _learned_before(out: Path) -> Coefficients | None:
    """Returns the coefficients of a run that has been killed after it had written its merge."""
    if not (out / CHECKPOINT_FOLDER).is_dir() or not (out / COEFFICIENTS_FILE).is_file():
        return None
    return Coefficients.load(out / COEFFICIENTS_FILE)


def ended_run(out: Path, console: Console) -> Run:
    """Returns the results of a run that has ended, and says that nothing is left to do."""
    if is_first_process():
        remove_partial(out)
    ended = f"{out} holds a run that has ended; there is nothing left to do"
    console.print(ended, highlight=False, soft_wrap=True)
    coefficients = Coefficients.load(out / COEFFICIENTS_FILE)
    return Run(out, coefficients, read_results(out / RESULTS_FILE).rows)


def _learn_and_export(
    recipe: Recipe,
    inputs: LearningInputs,
    record: RunRecord,
    root: Path,
    out: Path,
    console: Console,
    resume: bool,
    learned: Coefficients | None,
    harness: Harness | None,
) -> Run:
    """Learns, exports and evaluates, in this order: what evaluates has lost nothing if killed.

    Coefficients that the run has learned before, and exported, are only evaluated.
    """
    first, resolved = is_first_process(), recipe.model_dump(mode="json")
    workspace, models = inputs.workspace, inputs.workspace.models
    if first:
        if resume and (steps := discard_after_last_snapshot(out)) is not None:
            console.print(f"going on after {steps} steps")
        write_whole(out / RECIPE_FILE, yaml.safe_dump(resolved, sort_keys=False))
    wait_for_all("run folder made")
    if learned is None:
        with record.phase("similarity of the task vectors"):
            record.add(
                **describe_machine(),
                **describe_data(
                    inputs.calibration, workspace.data.test, language=models.family.language
                ),
                tensors=describe_tensors(models.base, models.kept_from_base, inputs.mixed),
                similarity=similarity(
                    list(models.experts), inputs.deltas, inputs.shapes, inputs.mixed
                ),
            )

    @contextmanager
    def show_stage(summary: str, steps: int) -> Iterator[OnStep]:
        if not first:
            yield lambda progress: None
            return
        console.print(summary)
        stage, _, _ = summary.partition(":")
        with (
            track(recipe.tracking, out, stage, resolved) as send,
            show_progress(
                list(inputs.calibration.examples), steps, out / METRICS_FILE, console, send
            ) as show,
        ):
            yield show

    def save(coefficients: Coefficients) -> None:
        if first and learned is None:
            coefficients.save(out / COEFFICIENTS_FILE)

    try:
        with record.phase("learning"), between_steps():
            result = learn_coefficients(
                inputs,
                show_stage=show_stage,
                show_count=count_on(console),
                on_result=save,
                state=out / STATE_FOLDER,
                learned=learned,
            )
    except NonFiniteObjectiveError:
        # A resumed run would diverge again.
        if first:
            remove_folder(out / STATE_FOLDER)
        raise
    rows = export_and_compare(
        recipe,
        inputs,
        result.coefficients,
        record,
        root,
        out,
        console,
        rows_of=lambda: [
            *baseline_rows(inputs, recipe.evaluation, console, RowCache.of(inputs)),
            learned_row(inputs, result, console),
        ],
        resume=resume,
        rows_without=partial(rows_without_experts, inputs, result, console=console)
        if recipe.evaluation.without_experts
        else None,
        harness=harness,
    )
    return Run(out, result.coefficients, rows)


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
    _print_results(results, console)
    wait_for_all("exported")
    return results.rows


def _harness_scores(
    harness: Harness, models: Models, out: Path, console: Console, results: Results
) -> HarnessResults:
    """Evaluates the checkpoint of a run by lm-eval; shows all other results where that fails."""
    try:
        return harness_results(harness, models, out / CHECKPOINT_FOLDER, console)
    except InputError as error:
        _print_results(results, console)
        raise InputError(
            f"{error}; the merge and its other results are in {out}: once that is mended, --resume "
            "evaluates what is missing"
        ) from error


def _print_results(results: Results, console: Console) -> None:
    if tables := results_tables(results):
        console.print(*tables, sep="\n\n")


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
    _print_notes(notes, console)
    account_lines = account(models, coefficients.parameters)
    _print_lines(account_lines, console)
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
    if made.needs_data:
        with console.status("opening checkpoints and data"):
            workspace = open_workspace(recipe, root, devices, count_on(console))
        models = workspace.models
    else:
        models = dataclasses.replace(open_models(recipe, root, to_run=False), devices=devices)
    require_no_predictions("method", method, made, models)
    tokenizer_owner(models.by_name, recipe.tokenizer)  # refused before anything is written
    require_space(out, export_bytes(models, recipe.export))
    initial = fit_initial_merge(models, method, options)
    coefficients = coefficients_of_method(models, initial)
    require_exportable(models, recipe.export, MergeFacts.of(coefficients), out)
    harness = open_harness(recipe.evaluation.lm_eval, recipe, models, root, console)
    account_lines = account(models, coefficients.parameters)
    _print_lines(account_lines, console)
    if made.needs_data:
        memory, in_words = make_memory(recipe.task_vectors.memory, devices), initial.in_words
        with console.status(in_words) as status:
            parameters = merge_from_data(
                workspace, initial, memory, lambda line: status.update(f"{in_words}: {line}")
            )
        tensors = stored_tensors(models, parameters, merged_names(models))
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
    _print_results(results, console)


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
    _print_notes(notes, console)


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
    _print_notes(notes, console)
    with console.status("reading task vectors"):
        coarsened = coarsen(models, coefficients, to)
    coarsened.coefficients.save(out)
    return coarsened


def evaluate(recipe: Recipe, checkpoint: str, *, root: Path, console: Console) -> Row | None:
    """Evaluates a checkpoint on the recipe's test data, with its own heads or those of experts.

    And on the tasks of lm-eval, where the recipe asks for some.

    Args:
        recipe: The recipe with the experts and the test data.
        checkpoint: The folder or Hub id of a model of the same architecture, or the run folder of
            a merge.
        root: Folder that relative paths of the recipe start from.
        console: The console that shows the table.

    Returns:
        The row of the table, with a score for each task; None without test data.

    Raises:
        InputError: A model or data cannot be used, or there is neither test data nor lm-eval.
    """
    console = silence_others(console)
    require_harness(recipe.evaluation.lm_eval)
    opened = Checkpoint.open(_checkpoint_in(checkpoint))
    is_tested = all(task.test is not None for task in recipe.tasks.values())
    if not is_tested and recipe.evaluation.lm_eval is None:
        raise InputError("tasks: every task needs test data to evaluate on")
    row = None
    if is_tested:
        devices = open_devices(**recipe.devices.model_dump())
        workspace = open_workspace(recipe, root, devices, count_on(console))
        models = workspace.models
    else:
        models = open_models(recipe, root, to_run=False)
    require_same_architecture(models.base.checkpoint, opened, role="checkpoint")
    matched = match_backbone(models, opened, "checkpoint")
    harness = open_harness(recipe.evaluation.lm_eval, recipe, models, root, console)
    if is_tested:
        if ends := ends_in_words(workspace.data.test, workspace.asked_ends):
            console.print(ends, highlight=False, soft_wrap=True)
        parameters = load_backbone(models, matched, workspace.dtype)
        evaluator = workspace.evaluator.with_heads(read_heads(workspace, opened))
        row = evaluator.row(checkpoint, parameters, workspace.data.test)
        del parameters
        _print_results(Results.of_rows([row]), console)
    if harness is not None and is_first_process():
        scores = harness_results(harness, models, opened.folder, console, name=checkpoint)
        _print_results(Results([], harness=scores), console)
    return row


def _checkpoint_in(path: str) -> str:
    """Returns the checkpoint that a path names: itself, or that of a run folder."""
    inside = Path(path).expanduser() / CHECKPOINT_FOLDER
    return str(inside) if (inside / CONFIG_FILE).is_file() else path


def export_job(
    models: Models,
    coefficients: Coefficients,
    settings: ExportRecipe,
    root: Path,
    account_lines: Sequence[str],
    *,
    tokenizer: str | None = None,
    datasets: Sequence[str] = (),
    results: Results | None = None,
) -> ExportJob:
    """Describes the export of learned coefficients.

    Args:
        models: The base and its experts.
        coefficients: The coefficients of these experts.
        settings: The dtype, the size of files, and the forms that are asked for.
        root: Folder that relative paths of the recipe start from.
        account_lines: The account of the base's tensors, for the model card.
        tokenizer: `base` or the task whose tokenizer the merge takes; None for the first.
        datasets: Hub ids of the calibration data, for the model card.
        results: The table of results and the outcome, for the model card.
    """
    return ExportJob(
        models,
        settings,
        partial(fold, models, coefficients),
        tasks=[task for task in models.experts if task not in coefficients.left_out],
        card=partial(
            model_card,
            None if coefficients.of_method_alone else coefficients,
            results or Results([]),
            method=coefficients.of_method_alone or "",
            origins=model_origins(models, root),
            datasets=datasets,
            account=account_lines,
            auto_class=models.auto_class(next(iter(models.experts))),
            auto_classes={task: models.auto_class(task) for task in models.experts},
            embeds=models.family.embeds is not None,
        ),
        coefficients=coefficients,
        tokenizer=tokenizer,
    )


def _describe_inputs(inputs: LearningInputs, base: str) -> str:
    models, calibration = inputs.workspace.models, inputs.calibration
    merged = sum(int(np.prod(models.base.shape(name))) for name in inputs.mixed)
    unchanged = len(models.base.names) - len(inputs.mixed)
    examples = sum(map(len, calibration.learning.values()))
    held_out = sum(map(len, calibration.held_out.values()))
    general = len(calibration.examples.get(RETAINED, ()))
    ends = ends_in_words(calibration.examples, inputs.workspace.asked_ends)
    return (
        f"{inputs.experts} experts of {base}, "
        f"{'run by their own PyTorch forward, ' if models.family.bridged else ''}"
        f"{merged / 1e6:.1f} M parameters in {len(inputs.mixed)} tensors merged"
        f"{f', {unchanged} tensors as in the base' if unchanged else ''}; "
        f"{examples} examples to learn from, {held_out} held out"
        f"{f', {general} of these general text' if general else ''}; "
        f"{f'{ends}; ' if ends else ''}on {inputs.devices}"
    )


def _print_lines(lines: Sequence[str], console: Console) -> None:
    console.print(*lines, sep="\n", highlight=False, soft_wrap=True)


def _print_notes(notes: Sequence[str], console: Console) -> None:
    for note in notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
