"""The command `learn`: from a recipe to a run folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console

from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.devices import Devices, is_first_process, open_devices, wait_for_all
from adamerge_jax.errors import NonFiniteObjectiveError
from adamerge_jax.evaluation.harness import Harness, require_harness
from adamerge_jax.evaluation.retention import RETAINED
from adamerge_jax.files.writing import remove_folder, write_whole
from adamerge_jax.pipeline.baselines import baseline_rows, learned_row
from adamerge_jax.pipeline.end_of_text import ends_in_words
from adamerge_jax.pipeline.ended_run import Run, ended_run
from adamerge_jax.pipeline.export import CHECKPOINT_FOLDER, MergeFacts, require_exportable
from adamerge_jax.pipeline.export_and_compare import export_and_compare
from adamerge_jax.pipeline.harness_rows import open_harness
from adamerge_jax.pipeline.learn import LearningInputs, OnStep, learn_coefficients, prepare
from adamerge_jax.pipeline.printing import print_notes
from adamerge_jax.pipeline.processes import by_first_process, silence_others
from adamerge_jax.pipeline.row_cache import RowCache
from adamerge_jax.pipeline.without_experts import rows_without_experts
from adamerge_jax.pipeline.workspace import open_workspace
from adamerge_jax.recipes.build import build
from adamerge_jax.recipes.schema import Recipe
from adamerge_jax.runs.counting import count_on
from adamerge_jax.runs.files import COEFFICIENTS_FILE, METRICS_FILE, RECIPE_FILE, STATE_FOLDER
from adamerge_jax.runs.lock import hold
from adamerge_jax.runs.picks import NO_PICKS, PickFields, Picks, picks_of_run
from adamerge_jax.runs.progress import show_progress
from adamerge_jax.runs.record import (
    RunRecord,
    describe_data,
    describe_machine,
    describe_tensors,
    similarity,
)
from adamerge_jax.runs.resuming import (
    discard_after_last_snapshot,
    has_ended,
    require_startable,
    unfinished,
)
from adamerge_jax.runs.tracking import require_installed, track
from adamerge_jax.stopping import between_steps

UNWATCHED = "general ability is not watched: there is no general text (see retain)"
"""The note of a language model's run without general text."""


def learn(
    recipe: Recipe,
    *,
    root: Path,
    out: Path,
    console: Console,
    resume: bool = False,
    pick_fields: PickFields | None = None,
) -> Run:
    """Learns coefficients, compares the merge with its baselines and exports it.

    Args:
        recipe: The recipe.
        root: Folder that relative paths of the recipe start from.
        out: The run folder to make. Nothing is written before all input has been checked.
        console: The console that shows progress and results.
        resume: If True, the run in `out` goes on from its last state; without a state it starts
            from the beginning.
        pick_fields: Picks the fields that the recipe leaves open; None for their defaults.

    Raises:
        InputError: The recipe, a checkpoint or data cannot be used, or `out`
            holds anything but a run of this recipe, or is in use.
        NonFiniteObjectiveError: Learning diverged; the run folder holds the last good
            coefficients.
        Stopped: A signal came, where signals are looked at; see `stop_on_signals`.
    """
    devices, out = open_devices(**recipe.devices.model_dump()), out.expanduser()
    with by_first_process(hold(out)):
        console, picks = silence_others(console), NO_PICKS
        if pick_fields is not None:
            picks = _picks(recipe, root, out, console, resume, pick_fields)
        recipe = picks.applied_to(recipe)
        return _learn(recipe, devices, root, out, console, resume, picks)


def _picks(
    recipe: Recipe, root: Path, out: Path, console: Console, resume: bool, pick_fields: PickFields
) -> Picks:
    """Returns what an earlier start of the run has picked, or picks."""
    if not resume:
        require_startable(out, {}, resume=False)  # refused before anything takes time
    elif (picked := picks_of_run(recipe, out)) is not None:
        return picked
    with console.status("planning") as status:
        picks = pick_fields(recipe, root, lambda line: status.update(f"planning: {line}"))
    if picks.line:
        console.print(picks.line, highlight=False, soft_wrap=True)
    return picks


def _learn(
    recipe: Recipe,
    devices: Devices,
    root: Path,
    out: Path,
    console: Console,
    resume: bool,
    picks: Picks,
) -> Run:
    """Checks all input of a run, then learns in its folder, which this process holds."""
    resolved = recipe.model_dump(mode="json")
    require_startable(out, resolved, resume=resume)
    if resume and has_ended(out, CHECKPOINT_FOLDER):
        return ended_run(out, console)
    require_installed(recipe.tracking)
    require_harness(recipe.evaluation.lm_eval)
    record = RunRecord(out)
    if picks.fields:
        record.add(picked=dict(picks.fields))
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
        print_notes([UNWATCHED], console)
    print_notes(models.notes, console)
    if method.heads.note is not None:
        print_notes([method.heads.note], console)
    if inputs.start is not None:
        print_notes(inputs.start.notes, console)

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
        f"{', several texts in a row' if calibration.packing else ''}"
        f"{f', {general} of these general text' if general else ''}; "
        f"{f'{ends}; ' if ends else ''}on {inputs.devices}"
    )
