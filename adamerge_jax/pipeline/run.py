"""What the command line runs: from a recipe to a run folder, from coefficients to a checkpoint."""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from jaxtyping import Array
from rich.console import Console

from adamerge_jax.checkpoints.architecture import require_same_architecture
from adamerge_jax.checkpoints.folders import require_new, require_space
from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.orbax import require_plain_path
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.data.tokenizers import tokenizer_owner
from adamerge_jax.devices import is_first_process, open_devices, wait_for_all
from adamerge_jax.errors import InputError, NonFiniteObjectiveError
from adamerge_jax.learning.learner import Progress
from adamerge_jax.methods import average, task_arithmetic
from adamerge_jax.pipeline.export import (
    EXPORTS,
    export,
    export_bytes,
    export_mergekit,
    require_adapters,
)
from adamerge_jax.pipeline.inputs import open_workspace
from adamerge_jax.pipeline.learn import Merge, Problem, learn_coefficients, merged_parameters, pose
from adamerge_jax.pipeline.match import prepare_fold
from adamerge_jax.pipeline.models import Models, match_backbone, open_models
from adamerge_jax.pipeline.read import load_backbone
from adamerge_jax.recipes.schema import Recipe
from adamerge_jax.report.maps import draw_coefficients
from adamerge_jax.report.page import write_page
from adamerge_jax.report.results import results_table
from adamerge_jax.runs.files import (
    COEFFICIENTS_FILE,
    HEAT_MAP_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    STATE_FOLDER,
)
from adamerge_jax.runs.progress import show_progress
from adamerge_jax.runs.record import (
    RunRecord,
    describe_data,
    describe_machine,
    describe_tensors,
    similarity,
)
from adamerge_jax.runs.results import Row, write_results
from adamerge_jax.runs.resuming import discard_after_last_snapshot, require_startable
from adamerge_jax.runs.tracking import require_installed, track

PLAIN_TASK_ARITHMETIC = 0.3
"""Task arithmetic's coefficient where there is no labelled data to choose it with."""


class Run(NamedTuple):
    """What a finished run leaves.

    Attributes:
        folder: The run folder.
        coefficients: The learned coefficients.
        rows: The table of results, the learned merge last; empty without test data.
    """

    folder: Path
    coefficients: Coefficients
    rows: list[Row]


def learn(recipe: Recipe, *, root: Path, out: Path, console: Console, resume: bool = False) -> Run:
    """Learns coefficients, compares the merge with its baselines and exports it.

    Args:
        recipe: What to merge and how.
        root: Folder that relative paths of the recipe start from.
        out: The run folder to make. Nothing is written before all input has been checked.
        console: Where progress and results are printed.
        resume: Whether to go on with the run in `out` from its last state; where there is none, the
            run starts from the beginning.

    Raises:
        InputError: Something in the recipe, the checkpoints or the data cannot be used, or `out`
            holds something else than an unfinished run of this recipe.
        NonFiniteObjectiveError: Learning diverged; the run folder holds the last good
            coefficients.
    """
    devices = open_devices(**recipe.devices.model_dump())
    first, console = is_first_process(), _of_first_process(console)
    out = out.expanduser()
    resolved = recipe.model_dump(mode="json")
    require_startable(out, resolved, resume=resume)
    require_plain_path(out)
    require_installed(recipe.tracking)
    record = RunRecord(out)
    with console.status("opening checkpoints and data"), record.phase("opening models and data"):
        workspace = open_workspace(recipe, root, devices)
        models = workspace.models
        require_space(out, export_bytes(models, recipe))
        if recipe.export.adapter:
            require_adapters(models, recipe.coefficients.granularity, recipe.interference)
    with (
        console.status("reading task vectors, asking the experts"),
        record.phase("task vectors and the experts' answers"),
    ):
        problem = pose(recipe, workspace)
    console.print(_summary(problem))
    if problem.start is not None:
        _print_notes(problem.start.notes, console)

    # Nobody writes before everybody has checked.
    wait_for_all("checked")
    if first:
        out.mkdir(parents=True, exist_ok=True)
        if resume and (steps := discard_after_last_snapshot(out, EXPORTS)) is not None:
            console.print(f"going on after {steps} steps")
        (out / RECIPE_FILE).write_text(yaml.safe_dump(resolved, sort_keys=False))
    wait_for_all("run folder made")
    with record.phase("similarity of the task vectors"):
        record.add(
            **describe_machine(),
            **describe_data(
                problem.calibration, workspace.data.test, language=models.family.language
            ),
            tensors=describe_tensors(models, problem.mixed),
            similarity=similarity(models, problem.deltas, problem.shapes, problem.mixed),
        )

    @contextmanager
    def watch(what: str, steps: int) -> Iterator[Callable[[Progress], None]]:
        if not first:
            yield lambda progress: None
            return
        console.print(what)
        stage, _, _ = what.partition(":")
        with (
            track(recipe.tracking, out, stage, resolved) as send,
            show_progress(list(recipe.tasks), steps, out / METRICS_FILE, console, send) as show,
        ):
            yield show

    def keep(coefficients: Coefficients) -> None:
        if first:
            coefficients.save(out / COEFFICIENTS_FILE)

    try:
        with record.phase("learning"):
            merge = learn_coefficients(problem, watch=watch, keep=keep, state=out / STATE_FOLDER)
    except NonFiniteObjectiveError:
        # It would diverge again.
        if first:
            shutil.rmtree(out / STATE_FOLDER, ignore_errors=True)
        raise
    if first:
        draw_coefficients(merge.coefficients, out / HEAT_MAP_FILE)

    rows = []
    if workspace.data.test:
        with console.status("evaluating"), record.phase("evaluating"):
            rows = [*baselines(problem), evaluate_merge(problem, merge)]
        if first:
            write_results(rows, out / RESULTS_FILE)
    with record.phase("writing checkpoints"):
        export(recipe, models, merge.coefficients, out, root=root, rows=rows, console=console)
    if first:
        write_page(out)
    if rows:
        console.print(results_table(rows))
    wait_for_all("exported")
    if first:
        shutil.rmtree(out / STATE_FOLDER, ignore_errors=True)
    return Run(out, merge.coefficients, rows)


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
        file: The coefficients.
        recipe: Says where base and experts are, in any order, and how to write the result.
        root: Folder that relative paths of the recipe start from.
        out: The folder to make; it gets what `export` writes, and where experts are scaled the
            coefficients that were folded.
        console: Where progress is printed.
        scale: What each expert's coefficients are multiplied with; 0 leaves the expert out, with
            the model of its task.
        allow_other_models: Whether to go on with models that the file was not learned for.

    Raises:
        InputError: The file cannot be read, was learned for other models, or is no adapter.
    """
    devices = open_devices(**recipe.devices.model_dump())
    console = _of_first_process(console)
    out = out.expanduser()
    require_new(out)
    if recipe.export.orbax:
        require_plain_path(out)
    coefficients, models, notes = prepare_fold(
        file,
        dataclasses.replace(_open_to_fold(recipe, root), devices=devices),
        scale=scale,
        allow_other_models=allow_other_models,
    )
    tokenizer_owner(models.by_name, recipe.tokenizer)  # refused before anything is written
    require_space(out, export_bytes(models, recipe))
    _print_notes(notes, console)
    wait_for_all("checked")
    export(recipe, models, coefficients, out, root=root, rows=[], console=console)
    if scale and is_first_process():
        coefficients.save(out / COEFFICIENTS_FILE)


def write_mergekit(file: Path, recipe: Recipe, *, root: Path, out: Path, console: Console) -> None:
    """Writes the YAML file with which mergekit makes the merge of learned coefficients.

    Args:
        file: The coefficients.
        recipe: Says where base and experts are, and the merge's dtype.
        root: Folder that relative paths of the recipe start from.
        out: The file to make.
        console: Where notes are printed.

    Raises:
        InputError: The file cannot be read, was learned for other models, or is of a merge that
            mergekit cannot make.
    """
    coefficients, models, notes = prepare_fold(file, _open_to_fold(recipe, root))
    export_mergekit(recipe, models, coefficients, out.expanduser())
    _print_notes(notes, console)


def evaluate(recipe: Recipe, checkpoint: str, *, root: Path, console: Console) -> Row:
    """Evaluates a checkpoint on the recipe's test data, with the heads of its experts.

    Args:
        recipe: Says which experts and which test data.
        checkpoint: Folder or Hub id of a model of the same architecture, e.g. a merged one.
        root: Folder that relative paths of the recipe start from.
        console: Where the table is printed.

    Raises:
        InputError: Something cannot be used, or a task has no test data.
    """
    workspace = open_workspace(recipe, root, open_devices(**recipe.devices.model_dump()))
    console = _of_first_process(console)
    opened = Checkpoint.open(checkpoint)
    require_same_architecture(workspace.models.base.checkpoint, opened, role="checkpoint")
    matched = match_backbone(workspace.models, opened, "checkpoint")
    if not workspace.data.test:
        raise InputError("tasks: every task needs test data to evaluate on")
    parameters = load_backbone(workspace.models, matched, workspace.dtype)
    row = workspace.evaluator.row(checkpoint, parameters, workspace.data.test)
    console.print(results_table([row]))
    return row


def baselines(problem: Problem) -> list[Row]:
    """What a learned merge is compared with, on the test data.

    Returns:
        Rows for the base, the experts, their average, and task arithmetic with the coefficient
        that is best on the validation data.
    """
    workspace, recipe = problem.workspace, problem.recipe
    test, validation = workspace.data.test, workspace.data.validation

    def merged(scales: Mapping[str, Array]) -> dict[str, Array]:
        return merged_parameters(problem.base, problem.deltas, scales)

    def scaled(coefficient: float) -> dict[str, Array]:
        return merged(task_arithmetic(problem.shapes, problem.experts, coefficient))

    def of_expert(task: str) -> float:
        return workspace.evaluator.score(workspace.expert(task, problem.base), task, test[task])

    coefficient = PLAIN_TASK_ARITHMETIC
    if validation:
        coefficient = max(
            recipe.evaluation.task_arithmetic,
            key=lambda value: workspace.evaluator.row("", scaled(value), validation).score,
        )
    row = workspace.evaluator.row
    after = " after interference steps" if problem.interference else ""
    return [
        row("base", problem.base, test),
        Row(
            "experts (one model each)",
            {task: of_expert(task) for task in test},
            workspace.evaluator.metric,
        ),
        row(f"average{after}", merged(average(problem.shapes, problem.experts)), test),
        row(f"task arithmetic ({coefficient:g}){after}", scaled(coefficient), test),
    ]


def evaluate_merge(problem: Problem, merge: Merge) -> Row:
    """The learned merge on the test data."""
    return problem.workspace.evaluator.row(
        f"learned ({merge.coefficients.granularity})",
        merge.parameters(problem.base),
        problem.workspace.data.test,
    )


def _of_first_process(console: Console) -> Console:
    """The console, or one that prints nothing in all processes but the first."""
    if is_first_process():
        return console
    logging.getLogger("adamerge_jax").setLevel(logging.ERROR)
    return Console(quiet=True)


def _summary(problem: Problem) -> str:
    recipe, models, calibration = problem.recipe, problem.workspace.models, problem.calibration
    merged = sum(int(np.prod(models.base.shape(name))) for name in problem.mixed)
    unchanged = len(models.base.names) - len(problem.mixed)
    examples = sum(map(len, calibration.learning.values()))
    held_out = sum(map(len, calibration.held_out.values()))
    return (
        f"{recipe.name} ({recipe.preset}): {problem.experts} experts of {recipe.base.path}, "
        f"{merged / 1e6:.1f} M parameters in {len(problem.mixed)} tensors merged"
        f"{f', {unchanged} tensors as in the base' if unchanged else ''}; "
        f"{examples} examples to learn from, {held_out} held out; on {problem.devices}"
    )


def _open_to_fold(recipe: Recipe, root: Path) -> Models:
    """Opens a recipe's models, of which the coefficients file says what is mixed.

    What a preset keeps from the base it keeps from learning, perhaps with another preset than the
    one that the file was learned with; `keep_from_base` of the user's own counts here too.
    """
    if recipe.keeps_what_the_preset_keeps:
        recipe = recipe.model_copy(update={"keep_from_base": []})
    return open_models(recipe, root)


def _print_notes(notes: Sequence[str], console: Console) -> None:
    for note in notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
