"""An expert more: from scratch, or from the coefficients of the others.

    python experiments/add_an_expert.py RECIPE --new TASK

learns a recipe of classifiers without TASK and keeps its coefficients, then learns the whole recipe
twice: from scratch, and from these coefficients in a third of the steps at half the learning rate.
What was learned is kept in the folder `--out`, so that an experiment that was interrupted goes on
where it stopped; delete a file of it to do that part again. The table, accuracy on the test data
after so many steps, is printed and written to `add_an_expert.json`.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from rich.console import Console
from rich.table import Table

from adamerge_jax import InputError, Recipe, load_recipe, parse_recipe
from adamerge_jax.cli.console import make_console
from adamerge_jax.learning.loop import Learned, Progress
from adamerge_jax.pipeline.baselines import learned_row
from adamerge_jax.pipeline.learn import ShowStage, learn_coefficients, prepare
from adamerge_jax.pipeline.workspace import open_workspace, require_classifiers
from adamerge_jax.recipes.build import build

RESULTS_FILE = "add_an_expert.json"
SCRATCH, WARM = "from scratch", "from the others' coefficients"


class Curve(NamedTuple):
    """One way of learning.

    Attributes:
        steps: The number of optimizer steps.
        learning_rate: The initial learning rate.
        seconds: The duration of learning, without evaluation.
        accuracy: Accuracy on the test data by task, by the number of steps: that of the best
            coefficients on the held-out data until then.
    """

    steps: int
    learning_rate: float
    seconds: float
    accuracy: dict[int, dict[str, float]]


def main() -> None:
    """Runs what is missing, prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="a recipe with test data, the new expert in it")
    parser.add_argument("--new", required=True, metavar="TASK", help="whose expert is added")
    parser.add_argument("--root", type=Path, help="where paths start; by default the recipe's own")
    parser.add_argument("--out", type=Path, default=Path("runs/add_an_expert"), help="folder")
    parser.add_argument("--preset", help="takes the place of the recipe's")
    parser.add_argument("--steps", type=int, help="from scratch; by default the recipe's")
    parser.add_argument("--warm-steps", type=int, help="from the file; by default a third")
    parser.add_argument(
        "--warm-learning-rate", type=float, help="from the file; by default half the recipe's"
    )
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    try:
        run(arguments, make_console())
    except InputError as error:
        parser.exit(2, f"error: {error}\n")


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Curve]:
    """The whole experiment.

    Raises:
        InputError: Something in the recipe, the checkpoints or the data cannot be used.
    """
    recipe = load_recipe(arguments.recipe, arguments.preset)
    if arguments.new not in recipe.tasks or len(recipe.tasks) < 2:
        raise InputError(f"--new {arguments.new}: the tasks are {', '.join(recipe.tasks)}")
    root = (arguments.root or arguments.recipe.parent).expanduser().resolve()
    out = arguments.out.resolve()
    steps = arguments.steps or recipe.learning.steps
    rate = recipe.learning.optimizer.learning_rate
    recipe = changed(recipe, steps, rate)
    file = out / f"without_{arguments.new}.safetensors"
    warm = changed(
        recipe,
        arguments.warm_steps or max(1, steps // 3),
        arguments.warm_learning_rate or rate / 2,
        file,
    )
    out.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        fields = recipe.model_dump()
        del fields["tasks"][arguments.new]
        learn_others(parse_recipe(fields), root, file, console)
    curves = {}
    for name, own, kept in (
        (SCRATCH, recipe, out / "from_scratch.json"),
        (WARM, warm, out / "from_the_others.json"),
    ):
        if not kept.exists():
            curve = learn_curve(own, root, console)
            kept.write_text(json.dumps(curve._asdict(), indent=1) + "\n")
        curves[name] = read_curve(kept)
    result = {name: curve._asdict() for name, curve in curves.items()}
    (out / RESULTS_FILE).write_text(json.dumps(result, indent=1) + "\n")
    console.print(summarise(curves))
    console.print(in_words(curves), highlight=False, soft_wrap=True)
    return curves


def changed(recipe: Recipe, steps: int, learning_rate: float, start: Path | None = None) -> Recipe:
    """The recipe with other steps, looked at twelve times, and another start.

    A cosine schedule then ends with the steps.
    """
    fields = recipe.model_dump()
    fields["learning"] |= {"steps": steps, "evaluate_every": max(1, steps // 12)}
    fields["learning"]["optimizer"]["learning_rate"] = learning_rate
    fields["coefficients"]["start"] = None if start is None else str(start)
    return parse_recipe(fields)


def learn_others(recipe: Recipe, root: Path, file: Path, console: Console) -> None:
    """Learns the coefficients of all experts but the new one, and keeps them."""
    workspace = open_workspace(recipe, root)
    require_classifiers(workspace)
    inputs = prepare(build(recipe, workspace.models), workspace)
    learn_coefficients(inputs, show_stage=collect_into([], console)).coefficients.save(file)


def learn_curve(recipe: Recipe, root: Path, console: Console) -> Curve:
    """Learns, then evaluates what each look at the held-out data had chosen.

    Raises:
        InputError: There is no test data, or what `prepare` raises.
    """
    workspace = open_workspace(recipe, root)
    require_classifiers(workspace)
    inputs = prepare(build(recipe, workspace.models), workspace)
    if not inputs.workspace.data.test:
        raise InputError("tasks: every task needs test data to evaluate on")
    for note in inputs.start.notes if inputs.start else ():
        console.print(f"note: {note}", soft_wrap=True)
    evaluations: list[tuple[int, Learned]] = []
    began = time.perf_counter()
    merge = learn_coefficients(inputs, show_stage=collect_into(evaluations, console))
    seconds = time.perf_counter() - began
    scores: dict[int, dict[str, float]] = {}
    by_chosen: dict[int, dict[str, float]] = {}
    for step, chosen in evaluations:
        if chosen.step not in by_chosen:
            row = learned_row(inputs, merge._replace(values=chosen.values))
            by_chosen[chosen.step] = row.tasks
        scores[step] = by_chosen[chosen.step]
    optimizer = recipe.learning.optimizer
    return Curve(recipe.learning.steps, optimizer.learning_rate, seconds, scores)


def collect_into(evaluations: list[tuple[int, Learned]], console: Console) -> ShowStage:
    """Collects the best coefficients so far at each evaluation on the held-out data."""

    @contextmanager
    def show_stage(summary: str, steps: int) -> Iterator[Any]:
        console.print(f"{summary}, {steps} steps", soft_wrap=True)
        evaluations.clear()  # those of a coarser stage before

        def show(progress: Progress) -> None:
            if progress.held_out is not None:
                evaluations.append((progress.step, progress.best or evaluations[-1][1]))
                objective = progress.held_out.objective.sum()
                console.print(f"step {progress.step}: {objective:.4f} on the held-out data")

        yield show

    return show_stage


def read_curve(file: Path) -> Curve:
    """Reads the curve that an earlier run of this script saved."""
    curve = Curve(**json.loads(file.read_text()))
    return curve._replace(accuracy={int(step): tasks for step, tasks in curve.accuracy.items()})


def average(scores: dict[str, float]) -> float:
    """Returns the mean over the tasks."""
    return sum(scores.values()) / len(scores)


def summarise(curves: dict[str, Curve]) -> Table:
    """Returns a table of the average accuracy by step, then of each task's at the end."""
    table = Table(title="Accuracy (%) after so many steps")
    table.add_column("steps", justify="right")
    for name, curve in curves.items():
        rate = f"learning rate {curve.learning_rate:g}"
        table.add_column(f"{name} ({curve.steps} steps, {rate})", justify="right")

    def cells(scores: list[float | None]) -> list[str]:
        return ["" if score is None else f"{100 * score:.1f}" for score in scores]

    for step in sorted({step for curve in curves.values() for step in curve.accuracy}):
        accuracies = [curve.accuracy.get(step) for curve in curves.values()]
        table.add_row(str(step), *cells([tasks and average(tasks) for tasks in accuracies]))
    table.add_section()
    ends = [curve.accuracy[max(curve.accuracy)] for curve in curves.values()]
    for task in ends[0]:
        table.add_row(task, *cells([end[task] for end in ends]))
    return table


def in_words(curves: dict[str, Curve]) -> str:
    """After how many steps the coefficients of the others lead to what is reached from scratch."""
    scratch, warm = curves[SCRATCH], curves[WARM]
    goal = average(scratch.accuracy[max(scratch.accuracy)])
    reached = [step for step, scores in warm.accuracy.items() if average(scores) >= goal]
    if not reached:
        best = max(average(scores) for scores in warm.accuracy.values())
        return (
            f"from scratch {100 * goal:.1f} after {scratch.steps} steps; from the others' "
            f"coefficients {100 * best:.1f} at most in {warm.steps}: not reached"
        )
    return (
        f"from scratch {100 * goal:.1f} after {scratch.steps} steps; from the others' coefficients "
        f"reached after {min(reached)} ({100 * min(reached) / scratch.steps:.0f}% of the steps)"
    )


if __name__ == "__main__":
    main()
