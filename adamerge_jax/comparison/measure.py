"""Measures one contender: merges, evaluates on the test data, and says what it cost."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from adamerge_jax.checkpoints.dtypes import DELTA_DTYPES
from adamerge_jax.comparison.contenders import BASE, FITS, Contender, choices_of
from adamerge_jax.data.batches import calibrate
from adamerge_jax.data.expert_targets import ask_expert
from adamerge_jax.devices import open_devices
from adamerge_jax.heads.fitted import Kind as FitKind
from adamerge_jax.interference import FittedStep
from adamerge_jax.learning.loop import Progress
from adamerge_jax.methods import make_method
from adamerge_jax.objectives import TargetSpec
from adamerge_jax.pipeline.heads import HeadParameters, fit_heads
from adamerge_jax.pipeline.learn import learn_coefficients, prepare, require_any_merged
from adamerge_jax.pipeline.merge import method_parameters
from adamerge_jax.pipeline.read import load_task_vectors
from adamerge_jax.pipeline.workspace import Workspace, open_workspace
from adamerge_jax.recipes.build import build
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.recipes.problems import require_no_predictions
from adamerge_jax.recipes.schema import HeadKind, Recipe
from adamerge_jax.runs.counting import CountLines
from adamerge_jax.runs.record import peak_memory_of_arrays
from adamerge_jax.runs.rows import Kind, Row
from adamerge_jax.task_vectors import Delta
from adamerge_jax.task_vectors.offload.memory import make_memory

Report = Callable[[str], Any]
"""The function that shows how far a contender is, in a line."""


class Cost(NamedTuple):
    """The cost of a merge, without its evaluation.

    Attributes:
        seconds: Wall-clock time from opened models to the merged parameters.
        evaluation_seconds: Wall-clock time of the evaluation on the test data.
        peak_memory_bytes: The largest memory up to the merged parameters, on the device or, on a
            CPU, of the process.
        device: The kind of device.
        steps: The number of optimizer steps.
        coefficients: The number of learned coefficients.
    """

    seconds: float
    evaluation_seconds: float
    peak_memory_bytes: int
    device: str
    steps: int = 0
    coefficients: int = 0


class Measured(NamedTuple):
    """The results of one contender.

    Attributes:
        rows: Its rows of the table, with the scores of each test example; the base's and the
            experts' for the references.
        cost: Its cost.
        chosen: The options that validation data chose.
        fits: For the references: the heads that can be fitted to these models.
    """

    rows: list[Row]
    cost: Cost
    chosen: Mapping[str, Any] = {}
    fits: tuple[HeadKind, ...] = ()


class _Merge(NamedTuple):
    """Merged parameters, and what they took."""

    parameters: Mapping[str, Any]
    steps: int = 0
    coefficients: int = 0
    chosen: Mapping[str, Any] = {}
    heads: HeadParameters = MappingProxyType({})


def measure(
    contender: Contender,
    data_seed: int,
    root: Path,
    *,
    state: Path | None = None,
    report: Report = lambda line: None,
    allow_code: bool = False,
) -> Measured:
    """Measures one contender.

    Args:
        contender: The contender.
        data_seed: The seed that draws test examples, which are the same for all contenders.
        root: Folder that relative paths of the recipe start from.
        state: The folder in which learning saves its state, and from which it resumes.
        report: Shows how far it is.
        allow_code: True if functions of the user's own may be imported.

    Raises:
        InputError: A model or data cannot be used, or the method does not go with them.
        NonFiniteObjectiveError: Learning diverged.
    """
    recipe = parse_recipe(contender.fields, allow_code=allow_code)
    report("opening models and data")
    workspace = _open(recipe, data_seed, root, report)
    evaluator, test = workspace.evaluator, workspace.data.test
    start = time.perf_counter()
    if contender.kind == "references":
        base = workspace.base()
        report("evaluating the base")
        rows = [evaluator.row("base", base, test)]
        scores = {}
        for task, examples in test.items():
            report(f"evaluating the expert of {task}")
            # No name for an expert: it is gone before the next one is read.
            scores[task] = evaluator.measures(workspace.expert(task, base), task, examples)
        rows.append(Row.of_measures("experts (one model each)", scores, "experts"))
        fits = _fits(workspace)
        return Measured(rows, _cost(0.0, time.perf_counter() - start), fits=fits)
    if contender.kind == "merge":
        merge = _merge(contender, recipe, workspace, report)
        if contender.heads in FITS:
            report("asking the experts, fitting heads")
            merge = merge._replace(heads=_fitted_heads(contender.heads, merge, recipe, workspace))
    else:
        merge = _learn(recipe, workspace, state, report)
    seconds, memory = time.perf_counter() - start, peak_memory_of_arrays()
    report("evaluating")
    start = time.perf_counter()
    kind: Kind = "learned"
    if contender.kind == "merge":
        kind = "baseline" if contender.heads == "kept" else "heads"
    row = evaluator.with_heads(merge.heads).row(contender.name, merge.parameters, test, kind)
    cost = _cost(seconds, time.perf_counter() - start)._replace(
        peak_memory_bytes=memory, steps=merge.steps, coefficients=merge.coefficients
    )
    return Measured([row], cost, merge.chosen)


def _fits(workspace: Workspace) -> tuple[HeadKind, ...]:
    """Returns the heads that can be fitted to the models of all tasks."""
    models = workspace.models
    layers = [models.head_form(task).last_layer for task in models.experts]
    if None in layers:
        return ()
    return FITS[:1] if any(last is not None and last.scaled_only for last in layers) else FITS


def _open(recipe: Recipe, data_seed: int, root: Path, report: Report) -> Workspace:
    """Opens models and data, the latter's test examples as the seed of all contenders draws them.

    Other seeds are to differ in what they learn from, not in what they are tested with.
    """
    devices = open_devices(**recipe.devices.model_dump())
    show_count = CountLines(report)
    workspace = open_workspace(recipe, root, devices, show_count)
    is_drawn = any(task.test is not None and task.test.limit for task in recipe.tasks.values())
    if is_drawn and recipe.seed != data_seed:
        same_data = recipe.model_copy(update={"seed": data_seed})
        same = open_workspace(same_data, root, devices, show_count)
        workspace = workspace._replace(data=workspace.data._replace(test=same.data.test))
    return workspace


def _merge(contender: Contender, recipe: Recipe, workspace: Workspace, report: Report) -> _Merge:
    """Merges by a method, with the options that are best on the validation data if there are some.

    The task vectors are read again only for other interference steps.
    """
    base = workspace.base()
    if contender.method == BASE:
        return _Merge(base)
    dtype_name = recipe.task_vectors.dtype or recipe.dtype
    dtype = DELTA_DTYPES[dtype_name] if dtype_name else None
    best, best_score = None, None
    choices = choices_of(contender.options)
    deltas: dict[str, Delta] = {}
    read_for: tuple[FittedStep, ...] | None = None
    for options in choices:
        method = make_method(contender.method, options)
        require_no_predictions("method", contender.method, method, workspace.models)
        if method.interference != read_for:
            report("reading task vectors")
            deltas = {}  # before others take their place
            memory = make_memory(recipe.task_vectors.memory, workspace.models.devices)
            deltas, _, _ = load_task_vectors(workspace.models, dtype, method.interference, memory)
            require_any_merged(deltas)
            read_for = method.interference
        report("merging")
        parameters = method_parameters(workspace, method, base, deltas, report)
        if len(choices) == 1:
            return _Merge(parameters)
        words = ", ".join(f"{name} {value}" for name, value in options.items())
        report(f"validating {words}")
        scores = {
            task: workspace.evaluator.example_scores(parameters, task, examples)
            for task, examples in workspace.data.validation.items()
        }
        score = Row.of_examples("", scores, workspace.evaluator.metric).score
        if best_score is None or score > best_score:
            best_score, best = score, _Merge(parameters, chosen=options)
    assert best is not None
    return best


def _fitted_heads(
    kind: FitKind, merge: _Merge, recipe: Recipe, workspace: Workspace
) -> HeadParameters:
    """Fits each task's head to its expert's logits on the features of a merge."""
    base, evaluator = workspace.base(), workspace.evaluator
    targets = {}
    for task, examples in workspace.data.calibration.items():

        def ask(
            inputs: Mapping[str, np.ndarray], expert: Any, task: str = task
        ) -> tuple[Array, dict[int, Array]]:
            return evaluator.run(expert, task, inputs)

        targets[task] = ask_expert(
            # No name for an expert: it is gone before the next one is read.
            partial(ask, expert=workspace.expert(task, base)),
            examples,
            TargetSpec(expert_logits=True),
            batch_size=evaluator.batch_size,
        )
    calibration = calibrate(
        workspace.data.calibration,
        batch_size=1,
        held_out=recipe.learning.held_out,
        seed=recipe.seed,
        targets=targets,
    )
    return fit_heads(workspace, merge.parameters, calibration, kind, recipe.seed)


def _learn(recipe: Recipe, workspace: Workspace, state: Path | None, report: Report) -> _Merge:
    """Learns coefficients as a recipe says."""

    @contextmanager
    def show_stage(summary: str, steps: int) -> Iterator[Callable[[Progress], None]]:
        stage, _, _ = summary.partition(":")

        def show(progress: Progress) -> None:
            if progress.held_out is not None:
                loss = progress.held_out.objective.sum()
                report(f"{stage}, step {progress.step} of {steps}: held-out loss {loss:.4f}")

        yield show

    report("reading task vectors, asking the experts")
    inputs = prepare(build(recipe, workspace.models), workspace)
    result = learn_coefficients(inputs, show_stage=show_stage, state=state)
    return _Merge(
        result.parameters(inputs.theta_start),
        sum(stage.steps for stage in inputs.method.stages),
        sum(array.size for array in result.coefficients.values.values()),
        heads=result.heads,
    )


def _cost(seconds: float, evaluation_seconds: float) -> Cost:
    device = str(jax.devices()[0].device_kind)
    return Cost(seconds, evaluation_seconds, peak_memory_of_arrays(), device)
