"""Every preset on the same classifiers: `python experiments/compare_presets.py RECIPE [...]`.

Of each recipe the models and the data are taken; how to learn comes from the presets. A preset
that needs labels learns from the recipe's validation data. Every run is a process of its own, so
that its peak memory is its own. Results are written after each run and runs that are already there
are not repeated: a comparison that was interrupted goes on where it stopped.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import transformers
from rich.table import Table

from adamerge_jax.cli.console import make_console
from adamerge_jax.errors import InputError
from adamerge_jax.learning.loop import Learned, Progress
from adamerge_jax.pipeline.baselines import baseline_rows, learned_row
from adamerge_jax.pipeline.learn import LearningInputs, learn_coefficients, prepare
from adamerge_jax.pipeline.workspace import open_workspace, require_classifiers
from adamerge_jax.recipes.build import build
from adamerge_jax.recipes.loading import load_recipe, parse_recipe, read_fields
from adamerge_jax.recipes.presets import PRESETS
from adamerge_jax.recipes.schema import Recipe
from adamerge_jax.report.results import in_words, percentage, scores
from adamerge_jax.runs.outcome import measure_outcome
from adamerge_jax.runs.record import peak_memory_of_arrays
from adamerge_jax.runs.rows import Row

BASELINES = "baselines"
HOW_TO_LEARN = {
    "preset",
    "keep_from_base",
    "interference",
    "coefficients",
    "objectives",
    "regularizers",
    "learning",
}
"""Fields that are the preset's and not the recipe's."""

REFERENCE, CHALLENGER = "adamerging", "recommended"
"""How long does the challenger take to what the reference reaches?"""


def main() -> None:
    """Runs what is missing, prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", type=Path, help="recipes with test data")
    parser.add_argument("--root", type=Path, help="where paths start; by default each recipe's own")
    parser.add_argument("--out", type=Path, default=Path("results.json"), help="file to write")
    parser.add_argument("--presets", nargs="+", default=sorted(PRESETS), help="by default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="by default 0 1 2")
    parser.add_argument("--examples", type=int, help="use at most so many of each task to learn")
    parser.add_argument("--one", nargs=2, metavar=("PRESET", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    try:
        if arguments.one:
            preset, seed = arguments.one
            recipe = arguments.recipes[0]
            result = run_one(arguments, recipe, preset, int(seed))
            print(json.dumps(result))
            return
        for preset in arguments.presets:
            if preset not in PRESETS:
                raise InputError(f"--presets: no {preset!r}; there are {', '.join(PRESETS)}")
        for recipe in arguments.recipes:
            require_data(recipe, arguments.presets)
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    compare(arguments)


def require_data(file: Path, presets: list[str]) -> None:
    """Refuses a recipe without the data that scores, or some of the presets, ask for.

    Raises:
        InputError: Says what is missing.
    """
    labelled = [preset for preset in presets if learns_from_labels(preset)]
    for task, own in load_recipe(file).tasks.items():
        if own.test is None:
            raise InputError(f"{file}: tasks.{task}.test: is missing; the table is made from it")
        if own.validation is None and labelled:
            raise InputError(
                f"{file}: tasks.{task}.validation: is missing, and {', '.join(labelled)} learn "
                "from it; give it, or name other --presets"
            )


def learns_from_labels(preset: str) -> bool:
    """Whether the preset's calibration data needs labels."""
    return any(term["name"] == "cross_entropy" for term in PRESETS[preset]["objectives"])


def compare(arguments: argparse.Namespace) -> None:
    """Starts a process for each run that the results file lacks."""
    console = make_console(width=220)
    results: dict[str, Any] = {}
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text())
    for recipe in arguments.recipes:
        title = str(recipe)
        if arguments.examples is not None:
            title += f", {arguments.examples} examples of each task"
        runs = results.setdefault(title, {})
        wanted = [(BASELINES, 0)]
        # The reference first: what it reaches is what the challenger is timed to.
        ordered = sorted(arguments.presets, key=lambda preset: preset != REFERENCE)
        wanted += [(preset, seed) for preset in ordered for seed in arguments.seeds]
        for preset, seed in wanted:
            key = f"{preset} {seed}"
            if key in runs:
                continue
            console.print(f"{title}: {preset}, seed {seed}")
            command = [sys.executable, __file__, str(recipe), "--one", preset, str(seed)]
            command += ["--root", str(_root(recipe, arguments))]
            if arguments.examples is not None:
                command += ["--examples", str(arguments.examples)]
            reference = runs.get(f"{REFERENCE} {seed}") or runs.get(f"{REFERENCE} 0")
            if preset == CHALLENGER and reference:
                command += ["--until", str(reference["average"])]
            process = subprocess.run(command, capture_output=True, text=True)
            if process.returncode:
                console.print(process.stderr)
                sys.exit(process.returncode)
            runs[key] = json.loads(process.stdout.splitlines()[-1])
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        console.print(summarise(title, runs, arguments.presets))


def run_one(arguments: argparse.Namespace, file: Path, preset: str, seed: int) -> dict[str, Any]:
    """One preset with one seed, or the baselines.

    Args:
        arguments: Of the command. With `until`, an accuracy, the result says after how many seconds
            it was reached.
        file: The recipe.
        preset: Which, or `baselines`.
        seed: Of the run.
    """
    root, until = _root(file, arguments), arguments.until
    fields = {name: value for name, value in read_fields(file).items() if name not in HOW_TO_LEARN}
    if preset == BASELINES:
        # Whatever the preset; this one does not ask the experts.
        recipe = parse_recipe(fields | {"preset": REFERENCE})
        workspace = open_workspace(recipe, root)
        require_classifiers(workspace)
        inputs = prepare(build(recipe, workspace.models), workspace)
        return {row.method: row.as_json() for row in baseline_rows(inputs, recipe.evaluation)}
    recipe = recipe_for(fields, preset, seed, arguments.examples)
    workspace = open_workspace(recipe, root)
    began = time.perf_counter()
    inputs = prepare(build(recipe, workspace.models), workspace)
    bests: list[tuple[float, str, Learned]] = []

    @contextmanager
    def watch(what: str, steps: int) -> Iterator[Any]:
        print(what, file=sys.stderr)

        def show(progress: Progress) -> None:
            if progress.best is not None:
                bests.append((time.perf_counter() - began, what, progress.best))

        yield show

    merge = learn_coefficients(inputs, show_stage=watch)
    seconds = time.perf_counter() - began
    row = learned_row(inputs, merge)
    coarse = recipe.coefficients.coarse
    result = row.as_json() | {
        "coefficients": sum(array.size for array in merge.coefficients.values.values()),
        "steps": recipe.learning.steps + (coarse.steps if coarse else 0),
        "kept_step": merge.coefficients.step,
        "seconds": seconds,
        "peak_gigabytes": peak_memory_of_arrays() / 1e9,
        "device": str(jax.devices()[0].device_kind),
    }
    if until is not None:
        last = bests[-1][1]
        for elapsed, what, best in bests:
            if what == last and accuracy_of(inputs, merge, best) >= until:
                return result | {"seconds_to_reference": elapsed}
    return result


def recipe_for(fields: dict[str, Any], preset: str, seed: int, examples: int | None) -> Recipe:
    """The recipe with a preset; where that needs labels, with the validation data to learn from."""
    chosen = fields | {"preset": preset, "seed": seed}
    if examples is not None:
        # One example of each task at least is held out.
        batch_size = min(examples - 1, PRESETS[preset]["learning"]["batch_size"])
        chosen |= {"learning": {"examples": examples, "batch_size": batch_size, "held_out": 0.1}}
    if learns_from_labels(preset):
        tasks = {t: own | {"calibration": own["validation"]} for t, own in fields["tasks"].items()}
        chosen |= {"tasks": tasks}
    return parse_recipe(chosen)


def accuracy_of(inputs: LearningInputs, merge: Any, best: Learned) -> float:
    """Average test accuracy of coefficients that were the best for a while."""
    return learned_row(inputs, merge._replace(values=best.values)).average


def summarise(title: str, runs: dict[str, Any], presets: list[str]) -> Table:
    """One line per preset: means over seeds, and the standard deviation of the average."""
    baselines = [Row.from_json(row) for row in runs[f"{BASELINES} 0"].values()]
    table = Table(title=f"{title}: accuracy (%), means over seeds")
    tasks = list(baselines[0].tasks)
    for column in ("method", *tasks, "average", "gap closed", "coefficients", "steps"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for column in ("seconds", "to adamerging (s)", "peak GB", "seeds"):
        table.add_column(column, justify="right")
    for row in baselines:
        table.add_row(row.method, *(in_words(score, row.metric) for score in scores(row)))
    for preset in presets:
        own = [run for key, run in runs.items() if key.rpartition(" ")[0] == preset]
        if not own:
            continue
        mean_scores = {task: float(np.mean([run["tasks"][task] for run in own])) for task in tasks}
        means = Row(preset, mean_scores, kind="learned")
        outcome = measure_outcome([*baselines, means])
        closed = None if outcome is None else outcome.average.closed
        reached = [run["seconds_to_reference"] for run in own if "seconds_to_reference" in run]
        table.add_row(
            preset,
            *(in_words(score, means.metric) for score in means.tasks.values()),
            f"{100 * means.average:.1f} ± {100 * np.std([run['average'] for run in own]):.1f}",
            percentage(closed, 0) or "",
            f"{own[0]['coefficients']:,}",
            str(own[0]["steps"]),
            f"{np.mean([run['seconds'] for run in own]):.0f}",
            f"{np.mean(reached):.0f}" if reached else "",
            f"{max(run['peak_gigabytes'] for run in own):.1f}",
            str(len(own)),
            style="bold" if preset == CHALLENGER else None,
        )
    return table


def _root(recipe: Path, arguments: argparse.Namespace) -> Path:
    return (arguments.root or recipe.parent).expanduser().resolve()


if __name__ == "__main__":
    main()
