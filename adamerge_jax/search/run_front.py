"""The command `front`: from a recipe to the coefficients files of what one task costs another."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from adamerge_jax.coefficients.file import BY_SCORE, Coefficients
from adamerge_jax.devices import Devices, is_first_process, open_devices, wait_for_all
from adamerge_jax.errors import InputError
from adamerge_jax.files.writing import remove_partial
from adamerge_jax.pipeline.baselines import baseline_rows
from adamerge_jax.pipeline.learn import LearningInputs, prepare
from adamerge_jax.pipeline.processes import by_first_process, silence_others
from adamerge_jax.pipeline.row_cache import RowCache
from adamerge_jax.pipeline.workspace import open_workspace
from adamerge_jax.recipes.schema import Recipe
from adamerge_jax.report.page import write_page
from adamerge_jax.report.results import results_tables
from adamerge_jax.runs.counting import count_on
from adamerge_jax.runs.evaluation_progress import show_evaluations
from adamerge_jax.runs.evaluations import Evaluation, read_evaluations
from adamerge_jax.runs.files import (
    EVALUATIONS_FILE,
    FRONT_FILE,
    FRONT_FOLDER,
    RESULTS_FILE,
    STATE_FOLDER,
)
from adamerge_jax.runs.front import Front, FrontPoint, SurfaceError
from adamerge_jax.runs.lock import hold
from adamerge_jax.runs.record import RunRecord
from adamerge_jax.runs.results import Results, write_results
from adamerge_jax.runs.resuming import require_startable, unfinished
from adamerge_jax.runs.rows import Row
from adamerge_jax.search.candidates import Candidates
from adamerge_jax.search.find_front import ROUNDS, FoundFront, count_samples, find_front
from adamerge_jax.search.run_search import begin_folder, describe_search, with_start
from adamerge_jax.search.scored import Scored
from adamerge_jax.search.scores import TaskScore, on_validation_data, task_score
from adamerge_jax.search.search_coefficients import (
    SINGLE,
    method_without_objective,
    singles,
    without_learning,
)


class FrontRun(NamedTuple):
    """The results of the command.

    Attributes:
        folder: The run folder.
        front: The front.
    """

    folder: Path
    front: Front


def front(
    recipe: Recipe, *, root: Path, out: Path, console: Console, resume: bool = False
) -> FrontRun:
    """Finds merges of which none is better in every task, and writes their coefficients files.

    Args:
        recipe: The recipe.
        root: Folder that relative paths of the recipe start from.
        out: The run folder to make. Nothing is written before all input has been checked.
        console: The console that shows progress and results.
        resume: If True, the run in `out` goes on after its last evaluation.

    Raises:
        InputError: The recipe, a checkpoint or data cannot be used, or `out` holds anything but a
            front of this recipe, or is in use.
        Stopped: A signal came, where signals are looked at; see `stop_on_signals`.
    """
    devices, out = open_devices(**recipe.devices.model_dump()), out.expanduser()
    with by_first_process(hold(out)):
        return _front(recipe, devices, root, out, silence_others(console), resume)


def _front(
    recipe: Recipe, devices: Devices, root: Path, out: Path, console: Console, resume: bool
) -> FrontRun:
    """Checks all input, then measures merges in the folder, which this process holds."""
    resolved = recipe.model_dump(mode="json")
    require_startable(out, resolved, resume=resume, log=EVALUATIONS_FILE)
    saved = Front.read(out / FRONT_FILE) if resume else None
    if saved is not None and not (out / STATE_FOLDER).is_dir():
        if is_first_process():
            remove_partial(out)
        console.print(f"{out} holds a front that is done; there is nothing left to do")
        return FrontRun(out, saved)
    experts, settings = len(recipe.tasks), recipe.front
    if experts < 2:
        raise InputError("front: one task costs no other one anything; give two tasks or more")
    grid = singles(recipe, settings.bounds, "front.bounds")
    samples = count_samples(settings, experts)
    record = RunRecord(out)
    log = read_evaluations(out / EVALUATIONS_FILE) if resume else []
    with console.status("opening checkpoints and data"), record.phase("opening models and data"):
        workspace = open_workspace(without_learning(recipe), root, devices, count_on(console))
        of_task = task_score(settings.score, workspace, "front")
        tasks = list(workspace.models.experts)
        score = on_validation_data(
            of_task, workspace, of_task.tasks(workspace, "front.score", tasks)
        )
        method = method_without_objective(recipe, workspace.models)
    with console.status("reading task vectors"), record.phase("task vectors"):
        words = f"{BY_SCORE}{score.words}"
        inputs = prepare(method._replace(objective_in_words=words), workspace)
        candidates = Candidates(inputs, layer_groups=1)
    total = len(grid) + samples + ROUNDS * settings.points
    console.print(
        f"{recipe.name}: {experts} experts of {recipe.base.path}, one coefficient each; "
        f"{score.words}, {'more' if score.maximise else 'less'} is better; at most {total} "
        f"evaluations: {len(grid)} of single coefficients, {samples} to fit surfaces to, the rest "
        f"where these say that the front is; on {devices}",
        highlight=False,
        soft_wrap=True,
    )

    # No process writes before all have checked.
    wait_for_all("checked")
    with by_first_process(unfinished(out, anew=not resume)):
        begin_folder(out, resolved)
        describe_search(record, inputs, score)

        def describe(evaluation: Evaluation) -> str:
            scores = (f"{task} {value:.4g}" for task, value in evaluation.tasks.items())
            return f"{evaluation.phase}: {', '.join(scores)}"

        scored = Scored(candidates, score, log)
        with record.phase("measuring merges"), show_evaluations(total, console, describe) as show:
            scored.write_to(out / EVALUATIONS_FILE, show)
            found = find_front(candidates, scored, settings, grid, samples, recipe.seed)
        with console.status("evaluating"), record.phase("evaluating"):
            rows, tests = _rows(recipe, inputs, candidates, scored, found, console)
            result = _describe_front(of_task, inputs, candidates, found, tests)
        if is_first_process():
            _write(out, candidates, result, found, rows)
    if rows:
        console.print(*results_tables(Results.of_rows(rows)), sep="\n\n")
    wait_for_all("written")
    return FrontRun(out, result)


def _rows(
    recipe: Recipe,
    inputs: LearningInputs,
    candidates: Candidates,
    scored: Scored,
    found: FoundFront,
    console: Console,
) -> tuple[list[Row], list[dict[str, float]]]:
    """Evaluates the front on the test data.

    Returns:
        The table: the baselines, then the points, last the one that is best on average on the
        validation data; and the scores of each point. Both are empty without test data.
    """
    workspace = inputs.workspace
    if not workspace.data.test:
        return [], [{} for _ in found.evaluations]
    singles_tried = [e for e in scored.evaluations if e.phase == SINGLE]
    start = max(singles_tried, key=scored.signed)
    single = float(candidates.point(start.coefficients)[0])
    settings = with_start(recipe.evaluation, single, workspace)
    rows = baseline_rows(inputs, settings, console, RowCache.of(inputs))
    of_points = [
        workspace.evaluator.row(
            f"front {number:02}",
            candidates.parameters(candidates.point(evaluation.coefficients)),
            workspace.data.test,
            "learned",
        )
        for number, evaluation in enumerate(found.evaluations, 1)
    ]
    best = max(range(len(of_points)), key=lambda at: scored.signed(found.evaluations[at]))
    others = [row for position, row in enumerate(of_points) if position != best]
    last = of_points[best]._replace(method=f"{of_points[best].method}, best on average")
    return [*rows, *others, last], [row.tasks for row in of_points]


def _describe_front(
    of_task: TaskScore,
    inputs: LearningInputs,
    candidates: Candidates,
    found: FoundFront,
    tests: list[dict[str, float]],
) -> Front:
    """Returns the front with all that it is compared with."""
    workspace, tasks = inputs.workspace, list(inputs.workspace.models.experts)
    on_front = {evaluation.number for evaluation in found.evaluations}
    coefficients = [
        dict(zip(tasks, candidates.point(evaluation.coefficients).tolist(), strict=True))
        for evaluation in found.evaluations
    ]
    # No name for an expert: it is gone before the next one is read.
    experts = {
        task: of_task.of(workspace, workspace.expert(task, inputs.base), task) for task in tasks
    }
    for task, score in experts.items():
        if not np.isfinite(score):
            raise InputError(
                f"expert {task!r}: its {of_task.words} on the validation data is not finite; look "
                "at the expert and its data"
            )
    return Front(
        score=of_task.words,
        maximise=of_task.maximise,
        points=[
            FrontPoint(f"{number:02}.safetensors", of_experts, dict(e.tasks), predicted, test)
            for number, (e, of_experts, predicted, test) in enumerate(
                zip(found.evaluations, coefficients, found.predicted, tests, strict=True), 1
            )
        ],
        experts=experts,
        singles=[
            (float(candidates.point(e.coefficients)[0]), dict(e.tasks))
            for e in found.measured
            if e.phase == SINGLE
        ],
        others=[
            dict(e.tasks) for e in found.measured if e.phase != SINGLE and e.number not in on_front
        ],
        fits={
            task: SurfaceError(fit.error, fit.left_out_error, fit.spread)
            for task, fit in found.fits.items()
        },
    )


def _write(
    out: Path, candidates: Candidates, result: Front, found: FoundFront, rows: list[Row]
) -> None:
    """Writes the files of a front, the front itself last but for the page that shows it."""
    folder = out / FRONT_FOLDER
    folder.mkdir(exist_ok=True)
    for point, evaluation in zip(result.points, found.evaluations, strict=True):
        coefficients: Coefficients = candidates.coefficients(
            candidates.point(evaluation.coefficients), evaluation.number
        )
        coefficients.save(folder / point.file)
    if rows:
        write_results(Results.of_rows(rows), out / RESULTS_FILE)
    result.write(out / FRONT_FILE)
    write_page(out)
