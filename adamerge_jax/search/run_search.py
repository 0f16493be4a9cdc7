"""The command `search`: from a recipe to the run folder of coefficients found by their score."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import yaml
from rich.console import Console

from adamerge_jax.coefficients.file import BY_SCORE, Coefficients
from adamerge_jax.devices import Devices, is_first_process, open_devices, wait_for_all
from adamerge_jax.errors import InputError
from adamerge_jax.evaluation.harness import require_harness
from adamerge_jax.files.writing import write_whole
from adamerge_jax.pipeline.account import account
from adamerge_jax.pipeline.baselines import baseline_rows
from adamerge_jax.pipeline.ended_run import Run, ended_run
from adamerge_jax.pipeline.export import (
    CHECKPOINT_FOLDER,
    ExportJob,
    MergeFacts,
    require_exportable,
)
from adamerge_jax.pipeline.export_and_compare import export_and_compare
from adamerge_jax.pipeline.export_job import export_job
from adamerge_jax.pipeline.harness_rows import open_harness
from adamerge_jax.pipeline.learn import LearningInputs, prepare
from adamerge_jax.pipeline.processes import by_first_process, silence_others
from adamerge_jax.pipeline.row_cache import RowCache
from adamerge_jax.pipeline.workspace import Workspace, open_workspace
from adamerge_jax.recipes.schema import EvaluationRecipe, LmEvalRecipe, MethodRecipe, Recipe
from adamerge_jax.runs.counting import count_on
from adamerge_jax.runs.evaluation_progress import show_evaluations
from adamerge_jax.runs.evaluations import Evaluation, discard_half_line, read_evaluations
from adamerge_jax.runs.files import COEFFICIENTS_FILE, EVALUATIONS_FILE, RECIPE_FILE
from adamerge_jax.runs.lock import hold
from adamerge_jax.runs.record import RunRecord, describe_machine, describe_tensors, similarity
from adamerge_jax.runs.resuming import has_ended, require_startable, unfinished
from adamerge_jax.runs.rows import Row
from adamerge_jax.search.candidates import Candidates
from adamerge_jax.search.evolution import require_installed
from adamerge_jax.search.score_command import split_command
from adamerge_jax.search.scored import Scored
from adamerge_jax.search.scores import (
    Score,
    of_command,
    of_harness,
    on_validation_data,
    task_score,
)
from adamerge_jax.search.search_coefficients import (
    SINGLE,
    Searched,
    method_without_objective,
    search_coefficients,
    singles_of_search,
    without_learning,
)


class ScoreCommand(NamedTuple):
    """A command that prints the score of a merge.

    Attributes:
        command: The program and its arguments, `{checkpoint}` for the merge's folder.
        timeout: The number of seconds that it may take.
    """

    command: str
    timeout: float


def search(
    recipe: Recipe,
    *,
    root: Path,
    out: Path,
    console: Console,
    command: ScoreCommand | None = None,
    resume: bool = False,
) -> Run:
    """Finds coefficients by a score without gradients, compares the merge and exports it.

    Args:
        recipe: The recipe.
        root: Folder that relative paths of the recipe start from.
        out: The run folder to make. Nothing is written before all input has been checked and the
            first merge was scored.
        console: The console that shows progress and results.
        command: The command that prints the score; by default it is that of the recipe.
        resume: If True, the search in `out` goes on after its last evaluation.

    Raises:
        InputError: The recipe, a checkpoint or data cannot be used, the command fails, or `out`
            holds anything but a search of this recipe, or is in use.
        Stopped: A signal came, where signals are looked at; see `stop_on_signals`.
    """
    require_installed()
    devices, out = open_devices(**recipe.devices.model_dump()), out.expanduser()
    with by_first_process(hold(out)):
        return _search(recipe, devices, root, out, silence_others(console), command, resume)


def _search(
    recipe: Recipe,
    devices: Devices,
    root: Path,
    out: Path,
    console: Console,
    command: ScoreCommand | None,
    resume: bool,
) -> Run:
    """Checks all input of a search, then searches in its folder, which this process holds."""
    resolved = recipe.model_dump(mode="json")
    require_startable(out, resolved, resume=resume, log=EVALUATIONS_FILE)
    if resume and has_ended(out, CHECKPOINT_FOLDER):
        return ended_run(out, console)
    grid = singles_of_search(recipe)
    words = split_command(command.command) if command else []
    require_harness(recipe.evaluation.lm_eval)
    require_harness(None if command else recipe.search.lm_eval)
    record = RunRecord(out)
    log = read_evaluations(out / EVALUATIONS_FILE) if resume else []
    with console.status("opening checkpoints and data"), record.phase("opening models and data"):
        workspace = open_workspace(without_learning(recipe), root, devices, count_on(console))
        models = workspace.models
        method = method_without_objective(recipe, models)
        if command:
            score = _command_score(words, command.timeout, recipe, workspace, out)
        elif recipe.search.lm_eval is not None:
            score = _harness_score(recipe.search.lm_eval, recipe, workspace, root, out, console)
        else:
            score = _validation_score(recipe, workspace)
    harness = open_harness(recipe.evaluation.lm_eval, recipe, models, root, console)
    with console.status("reading task vectors"), record.phase("task vectors"):
        inputs = prepare(method._replace(objective_in_words=f"{BY_SCORE}{score.words}"), workspace)
        candidates = Candidates(inputs, recipe.search.layer_groups)
        facts = MergeFacts.of_method(method, models)._replace(granularity=candidates.granularity)
        require_exportable(models, recipe.export, facts, out)
    _require_same_score(record, score.words)
    scored = Scored(candidates, score, log)
    with console.status("scoring the first merge"), record.phase("searching"):
        scored.try_first(candidates.all_at(grid[0]), SINGLE)
    console.print(
        f"{recipe.name}: {inputs.experts} experts of {recipe.base.path}, "
        f"{candidates.size} coefficients ({candidates.granularity.name}); {score.words}, "
        f"{'more' if score.maximise else 'less'} is better; {recipe.search.evaluations} "
        f"evaluations, {len(grid)} of them of single coefficients; on {devices}",
        highlight=False,
        soft_wrap=True,
    )

    # No process writes before all have checked.
    wait_for_all("checked")
    with by_first_process(unfinished(out, anew=not resume)):
        begin_folder(out, resolved)
        if log:
            console.print(f"going on after {len(log)} evaluations")
        describe_search(record, inputs, score)

        def describe(evaluation: Evaluation) -> str:
            best = scored.best()
            return f"score {evaluation.score:.4g}, best {best.score:.4g} (of {best.number})"

        with (
            record.phase("searching"),
            show_evaluations(recipe.search.evaluations, console, describe) as show,
        ):
            scored.write_to(out / EVALUATIONS_FILE, show)
            searched = search_coefficients(
                candidates, score, scored, recipe.search, grid, recipe.seed
            )
        inputs = inputs._replace(method=inputs.method._replace(initial=searched.single))
        candidates.inputs = inputs
        coefficients = candidates.coefficients(searched.point, searched.evaluation.number)
        if is_first_process():
            coefficients.save(out / COEFFICIENTS_FILE)
        rows = export_and_compare(
            recipe,
            inputs,
            coefficients,
            record,
            root,
            out,
            console,
            rows_of=partial(_rows, recipe, inputs, candidates, searched, console),
            resume=resume,
            harness=harness,
        )
    return Run(out, coefficients, rows)


def _command_score(
    words: list[str], timeout: float, recipe: Recipe, workspace: Workspace, out: Path
) -> Score:
    """Returns the score that a command prints for a merge's checkpoint alone."""
    if jax.process_count() > 1:
        raise InputError(
            "--score-command: is run by one process; leave out devices.distributed, or the command"
        )
    job_of = _job_of_candidates(recipe, workspace)
    return of_command(words, timeout, recipe.search.maximise, job_of, out)


def _harness_score(
    settings: LmEvalRecipe,
    recipe: Recipe,
    workspace: Workspace,
    root: Path,
    out: Path,
    console: Console,
) -> Score:
    """Returns the score of a merge's checkpoint by lm-eval."""
    if jax.process_count() > 1:
        raise InputError("search.lm_eval: is for one process; leave out devices.distributed")
    alone = settings.model_copy(update={"models": "merge"})
    harness = open_harness(alone, recipe, workspace.models, root, console)
    assert harness is not None
    return of_harness(harness, _job_of_candidates(recipe, workspace), out)


def _job_of_candidates(recipe: Recipe, workspace: Workspace) -> Callable[[Coefficients], ExportJob]:
    """Returns the function from coefficients to the export of their checkpoint alone."""
    settings = recipe.export.model_copy(update={"orbax": False, "adapter": False})
    models = workspace.models

    def job_of(coefficients: Coefficients) -> ExportJob:
        account_lines = account(models, coefficients.parameters)
        return export_job(
            models,
            coefficients,
            settings,
            workspace.root,
            account_lines,
            tokenizer=recipe.tokenizer,
        )

    return job_of


def _validation_score(recipe: Recipe, workspace: Workspace) -> Score:
    """Returns the score of the recipe."""
    settings = recipe.search
    of_task = task_score(settings.score, workspace, "search")
    field = "search.score" if settings.tasks is None else "search.tasks"
    return on_validation_data(of_task, workspace, of_task.tasks(workspace, field, settings.tasks))


def _require_same_score(record: RunRecord, words: str) -> None:
    """Refuses to go on with a search by another score."""
    before = record.fields.get("score", {}).get("words", words)
    if before != words:
        raise InputError(
            f"the run folder has scores of another kind: {before}, and now it would be {words}; "
            "give the same --score-command, or choose another folder"
        )


def begin_folder(out: Path, resolved: Mapping[str, Any]) -> None:
    """Writes the recipe to a folder of scored merges, whose log may end in half a line.

    Args:
        out: The run folder.
        resolved: The recipe's fields.
    """
    if is_first_process():
        discard_half_line(out / EVALUATIONS_FILE)
        write_whole(out / RECIPE_FILE, yaml.safe_dump(resolved, sort_keys=False))
    wait_for_all("run folder made")


def describe_search(record: RunRecord, inputs: LearningInputs, score: Score) -> None:
    """Notes in the record of a run its score, what it merges, and the machine."""
    models = inputs.workspace.models
    record.add(
        **describe_machine(),
        score={"words": score.words, "maximise": score.maximise},
        tensors=describe_tensors(models.base, models.kept_from_base, inputs.mixed),
        similarity=similarity(list(models.experts), inputs.deltas, inputs.shapes, inputs.mixed),
    )


def _rows(
    recipe: Recipe,
    inputs: LearningInputs,
    candidates: Candidates,
    searched: Searched,
    console: Console,
) -> list[Row]:
    """Evaluates the baselines, the start of the search among them, and the merge on test data."""
    workspace = inputs.workspace
    settings = with_start(recipe.evaluation, searched.single, workspace)
    return [
        *baseline_rows(inputs, settings, console, RowCache.of(inputs)),
        workspace.evaluator.row(
            f"searched ({candidates.granularity.name})",
            candidates.parameters(searched.point),
            workspace.data.test,
            "learned",
        ),
    ]


def with_start(settings: EvaluationRecipe, single: float, workspace: Workspace) -> EvaluationRecipe:
    """Returns the settings of the table with the coefficient that the search started from."""
    if workspace.data.validation:
        # It was chosen with labels already, by the score that counts here.
        return settings.model_copy(update={"task_arithmetic": [single]})
    start = MethodRecipe(name="task_arithmetic", options={"coefficient": single})
    return settings.model_copy(update={"methods": [*settings.methods, start]})
