"""Compares methods: measures what is missing, one contender after the other, then makes tables."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from adamerge_jax.comparison.contenders import (
    DEFAULT_ENTRIES,
    Contender,
    make_contenders,
    reference_contender,
)
from adamerge_jax.comparison.measure import Measured
from adamerge_jax.comparison.picture import draw_comparison
from adamerge_jax.comparison.progress import Progress
from adamerge_jax.comparison.saved import load, row_file
from adamerge_jax.comparison.summary import Comparison, summarise
from adamerge_jax.comparison.tables import as_markdown, score_table, standing_table
from adamerge_jax.comparison.worker import Job, JobFailed, RunJob, run_in_process
from adamerge_jax.errors import InputError, readable
from adamerge_jax.files.writing import remove_partial, write_whole
from adamerge_jax.recipes.schema import HeadKind, Recipe
from adamerge_jax.report.pictures import write_png
from adamerge_jax.runs.files import LOCK_FILE
from adamerge_jax.runs.lock import hold

ROWS_FOLDER = "rows"
STATE_FOLDER = "state"
JSON_FILE = "comparison.json"
MARKDOWN_FILE = "comparison.md"
PICTURE_FILE = "comparison.png"
LOG_FILE = "progress.log"

_NAMES = {ROWS_FOLDER, STATE_FOLDER, JSON_FILE, MARKDOWN_FILE, PICTURE_FILE, LOG_FILE, LOCK_FILE}

Loaded = dict[Path, Measured]
"""The results by the file of the row."""


def compare_methods(
    recipe: Recipe,
    entries: Iterable[str] = DEFAULT_ENTRIES,
    seeds: Sequence[int] = (0, 1, 2),
    heads: Sequence[HeadKind] = (),
    *,
    root: Path,
    out: Path,
    console: Console,
    allow_code: bool = False,
    run_job: RunJob = run_in_process,
) -> Comparison:
    """Compares methods on a recipe's models and data.

    Args:
        recipe: The recipe, with test data.
        entries: The methods; see `make_contenders`.
        seeds: The seeds of methods with any randomness.
        heads: The heads that each method is measured with; see `make_contenders`.
        root: Folder that relative paths of the recipe start from.
        out: The folder of the comparison, new or of an earlier one. Rows that are there, and whose
            recipe, models and data are still the same, are not measured again.
        console: The console that shows progress and results.
        allow_code: True if functions of the user's own may be imported.
        run_job: The function that measures one contender.

    Returns:
        The table, which is also in the folder as JSON, as Markdown and as a picture.

    Raises:
        InputError: The recipe, a model or data cannot be used, or the folder holds something else.
        Stopped: A signal came; the same call goes on.
    """
    # What is wrong with them is said before hours of measuring.
    entries = list(entries)
    make_contenders(recipe, entries, seeds, heads, may_run_code=allow_code)
    out = out.expanduser()
    if out.is_dir() and (others := {path.name for path in out.iterdir()} - _NAMES):
        raise InputError(
            f"{out} holds {min(others)!r}, which is no file of a comparison; choose another folder"
        )
    with hold(out):
        (out / ROWS_FOLDER).mkdir(exist_ok=True)
        remove_partial(out)

        def job_of(contender: Contender) -> Job:
            file = row_file(out / ROWS_FOLDER, contender, recipe.seed, root)
            state = out / STATE_FOLDER / file.stem
            return Job(contender, recipe.seed, root, file, state, allow_code)

        references = _measure_references(job_of(reference_contender(recipe)), console, out, run_job)
        contenders = make_contenders(
            recipe, entries, seeds, heads, fits=references.fits, may_run_code=allow_code
        )
        jobs = list(map(job_of, contenders))
        loaded = {job.file: measured for job in jobs if (measured := load(job.file)) is not None}
        failed = _measure_missing(jobs, loaded, console, out, run_job)
        comparison = summarise(references, _by_method(jobs, loaded), failed)
        write_whole(
            out / JSON_FILE, json.dumps(comparison.as_json(), indent=2, ensure_ascii=False) + "\n"
        )
        write_whole(out / MARKDOWN_FILE, as_markdown(comparison, recipe.name))
        write_png(draw_comparison(comparison), out / PICTURE_FILE)
        with suppress(OSError):  # not empty: a row was stopped while it learned
            (out / STATE_FOLDER).rmdir()
    for table in (comparison, *comparison.further):
        console.print(score_table(table))
        console.print(standing_table(table))
    return comparison


def _measure_references(job: Job, console: Console, out: Path, run_job: RunJob) -> Measured:
    """Returns the scores of the base and the experts, measured unless they are there.

    Raises:
        InputError: They cannot be measured, so that nothing else can.
    """
    measured = load(job.file)
    if measured is None:
        progress = Progress(console, out / LOG_FILE, [job.contender], 0)
        try:
            with progress.measuring(job.contender) as report:
                run_job(job, report)
        except JobFailed as failure:
            raise InputError(str(failure)) from failure
        measured = load(job.file)
        assert measured is not None
        progress.done(job.contender, measured)
    return measured


def _measure_missing(
    jobs: Sequence[Job], loaded: Loaded, console: Console, out: Path, run_job: RunJob
) -> dict[str, str]:
    """Measures the contenders that have no row yet, and returns why some will have none."""
    missing = [job for job in jobs if job.file not in loaded]
    progress = Progress(
        console,
        out / LOG_FILE,
        [job.contender for job in missing],
        len(jobs) - len(missing),
    )
    failed: dict[str, str] = {}
    refused: dict[str, str] = {}
    for job in missing:
        contender = job.contender
        merge = contender.name.removesuffix(f", heads {contender.heads}")
        if merge in refused:
            failed[contender.name] = refused[merge]
            progress.skip(contender)
            continue
        try:
            with progress.measuring(contender) as report:
                run_job(job, report)
        except JobFailed as failure:
            failed[contender.name] = readable(str(failure))
            if failure.is_refused:
                refused[merge] = failed[contender.name]  # with any seed and any heads
            progress.failed(contender, failed[contender.name])
            continue
        if (measured := load(job.file)) is not None:
            loaded[job.file] = measured
            progress.done(contender, measured)
    return failed


def _by_method(jobs: Sequence[Job], loaded: Loaded) -> dict[str, dict[int, Measured]]:
    """Returns the rows that are there, by method and seed."""
    by_method: dict[str, dict[int, Measured]] = defaultdict(dict)
    for job in jobs:
        if job.file in loaded:
            by_method[job.contender.name][job.contender.seed] = loaded[job.file]
    return by_method
