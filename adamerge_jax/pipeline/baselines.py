"""The rows of the table of results: the learned merge and its baselines."""

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil
from typing import Any, NamedTuple

from jaxtyping import Array
from rich.console import Console

from adamerge_jax.data.batches import Calibration
from adamerge_jax.data.examples import Examples
from adamerge_jax.evaluation.evaluator import Evaluator
from adamerge_jax.interference import FittedStep
from adamerge_jax.methods import (
    MergeMethod,
    average,
    make_method,
    task_arithmetic,
)
from adamerge_jax.pipeline.heads import MOST_TO_FIT, fit_heads
from adamerge_jax.pipeline.learn import (
    LearningInputs,
    MergeResult,
    ask_for_logits,
    with_fewer_copies,
)
from adamerge_jax.pipeline.merge import method_parameters
from adamerge_jax.pipeline.read import load_task_vectors
from adamerge_jax.pipeline.row_cache import RowCache, RowFacts
from adamerge_jax.recipes.schema import EvaluationRecipe, MethodRecipe
from adamerge_jax.registry import choice_in_words, is_own_code
from adamerge_jax.runs.counting import count_on, count_silently
from adamerge_jax.runs.rows import Kind, Row
from adamerge_jax.task_vectors import Delta
from adamerge_jax.task_vectors.offload.memory import make_memory
from adamerge_jax.walk import lowest_from_coarse

PLAIN_TASK_ARITHMETIC = 0.3
"""Task arithmetic's coefficient where there is no labelled data to choose it with."""

_FROM_CACHE = "some baselines are those of an earlier run with the same models and data"


class _Baseline(NamedTuple):
    """A model of the table, or the experts.

    Attributes:
        facts: The properties of its rows; None where they are not to be kept.
        examples: The number of examples that models are run on for them.
        measure: The function that evaluates it.
    """

    facts: RowFacts | None
    examples: int
    measure: Callable[[], list[Row]]


def baseline_rows(
    inputs: LearningInputs,
    settings: EvaluationRecipe,
    console: Console | None = None,
    cache: RowCache | None = None,
) -> list[Row]:
    """Evaluates the baselines of a learned merge on the test data.

    Args:
        inputs: The models, task vectors and data.
        settings: The baselines that are wanted, the coefficients among which task arithmetic
            chooses by validation data, and further merge methods.
        console: The console that shows how many examples models have been run on, and the time
            left.
        cache: The rows that earlier runs have measured; None to measure all.

    Returns:
        The rows of the base, the experts, their average, task arithmetic with the coefficient that
        is best on the validation data (`PLAIN_TASK_ARITHMETIC` without such data, and then its name
        does not say that it was chosen), the merge that learning starts from, if by a method, and
        the further methods. Where the merge's heads are not the experts', each single model has a
        second row, with heads fitted to it.
    """
    baselines = _Table(inputs, settings, console, cache).baselines()
    cached = [
        None if cache is None or baseline.facts is None else cache.find(baseline.facts)
        for baseline in baselines
    ]
    examples = sum(
        baseline.examples for baseline, rows in zip(baselines, cached, strict=True) if rows is None
    )
    if console is not None and examples and len(cached) > cached.count(None):
        console.print(_FROM_CACHE, highlight=False, soft_wrap=True)
    table = []
    show = count_silently if console is None else count_on(console)
    with inputs.workspace.evaluator.tally.shown(show, "baselines: examples", examples):
        for baseline, rows in zip(baselines, cached, strict=True):
            if rows is None:
                rows = baseline.measure()
                if cache is not None and baseline.facts is not None:
                    cache.keep(baseline.facts, rows)
            table += rows
    return table


class _Table:
    """The baselines of one run.

    Attributes:
        inputs: The models, task vectors and data.
    """

    def __init__(
        self,
        inputs: LearningInputs,
        settings: EvaluationRecipe,
        console: Console | None,
        cache: RowCache | None,
    ):
        """Evaluates nothing yet; the arguments are those of `baseline_rows`."""
        self.inputs = inputs
        self._settings, self._console, self._cache = settings, console, cache
        self._fit = inputs.method.heads.fit
        self._after = " after interference steps" if inputs.interference else ""
        self._tested = _count(inputs.workspace.data.test)

    def baselines(self) -> list[_Baseline]:
        """Returns the baselines that the settings want, in the order of the table."""
        wanted, base = self._settings.baselines, lambda: self.inputs.base
        baselines = []
        if wanted == "all":
            baselines.append(self._single("base", base))
        if wanted != "none":
            facts = RowFacts(["experts (one model each)"], ["experts"], {}, False)
            baselines.append(_Baseline(facts, self._tested, self._expert_rows))
        if wanted == "all":
            average_of_all = partial(_merged, self.inputs, average())
            baselines.append(self._single(f"average{self._after}", average_of_all))
        if wanted != "none":
            baselines += [self._task_arithmetic(), *self._initial_merge()]
        return [*baselines, *map(self._of_method, self._settings.methods)]

    @functools.cached_property
    def _to_fit(self) -> Calibration:
        """The examples that heads are fitted to, perhaps without the experts' answers."""
        return with_fewer_copies(self.inputs.calibration, MOST_TO_FIT)

    @functools.cached_property
    def _calibration(self) -> Calibration:
        """The examples that heads are fitted to, with the experts' answers."""
        calibration = self._to_fit
        if all(targets.has_expert for targets in calibration.targets.values()):
            return calibration
        # A run that was killed while it evaluated has not asked again.
        return calibration._replace(targets=ask_for_logits(self.inputs, calibration))

    def _single(
        self,
        name: str,
        parameters: Callable[[], Mapping[str, Array]],
        settings: Mapping[str, Any] | None = None,
        *,
        kept: bool = True,
        reads_data: bool = False,
    ) -> _Baseline:
        """Describes the rows of one model, made when it is evaluated."""
        facts = self._facts([name], settings or {}, reads_data=reads_data) if kept else None
        return _Baseline(
            facts, self._examples_of_one(), lambda: self._rows_of_one(name, parameters())
        )

    def _facts(
        self, names: Sequence[str], settings: Mapping[str, Any], *, reads_data: bool = False
    ) -> RowFacts:
        kinds: list[Kind] = ["baseline"] if self._fit is None else ["baseline", "heads"]
        settings = {**settings, "heads": self._fit}
        reads_data |= self._fit is not None or bool(self.inputs.workspace.backbone.batch_statistics)
        return RowFacts(names, kinds, settings, reads_data)

    def _examples_of_one(self) -> int:
        fitted = 0 if self._fit is None else _count(self._to_fit.examples)
        general = self.inputs.workspace.general
        return self._tested + fitted + (0 if general is None else len(general.test))

    def _expert_rows(self) -> list[Row]:
        workspace = self.inputs.workspace
        # No name for an expert: it is gone before the next one is read.
        measures = {
            task: workspace.evaluator.measures(
                workspace.expert(task, self.inputs.base), task, examples
            )
            for task, examples in workspace.data.test.items()
        }
        return [Row.of_measures("experts (one model each)", measures, "experts")]

    def _task_arithmetic(self) -> _Baseline:
        """Describes task arithmetic, whose coefficient is chosen when it is evaluated."""
        validation = self.inputs.workspace.data.validation
        if not validation:
            name = f"task arithmetic ({PLAIN_TASK_ARITHMETIC:g}){self._after}"
            method = task_arithmetic(PLAIN_TASK_ARITHMETIC)
            return self._single(name, partial(_merged, self.inputs, method))
        candidates = sorted(set(self._settings.task_arithmetic))

        def name_of(coefficient: float) -> str:
            return f"task arithmetic ({coefficient:g}, chosen with labels){self._after}"

        def measure() -> list[Row]:
            coefficient = _best_coefficient(self.inputs, candidates)
            merged = _merged(self.inputs, task_arithmetic(coefficient))
            return self._rows_of_one(name_of(coefficient), merged)

        digests = {} if self._cache is None else self._cache.digest_of(validation)
        settings = {"among": candidates, "validation": digests}
        facts = self._facts([name_of(coefficient) for coefficient in candidates], settings)
        tried = min(len(candidates), ceil(len(candidates) / 3) + 2)
        examples = self._examples_of_one() + tried * _count(validation)
        return _Baseline(facts, examples, measure)

    def _initial_merge(self) -> list[_Baseline]:
        """Describes the merge that learning starts from, unless it is among the methods."""
        initial, methods = self.inputs.initial_merge, self._settings.methods
        rows_of_methods = {choice_in_words(method.name, method.options) for method in methods}
        if initial is None or initial.in_words in rows_of_methods:
            return []
        return [
            self._single(
                initial.in_words,
                lambda: self.inputs.theta_start,
                {"method": initial.name, "options": dict(initial.options)},
                kept=not is_own_code(initial.name),
                reads_data=True,
            )
        ]

    def _of_method(self, chosen: MethodRecipe) -> _Baseline:
        """Describes a merge method with its own interference steps, in place of the recipe's."""
        in_words = choice_in_words(chosen.name, chosen.options)
        return self._single(
            in_words,
            partial(_parameters_of_method, self.inputs, chosen, self._console),
            {"method": chosen.name, "options": dict(chosen.options)},
            kept=not is_own_code(chosen.name),
            reads_data=True,
        )

    def _rows_of_one(self, name: str, parameters: Mapping[str, Array]) -> list[Row]:
        """Evaluates a model with the experts' heads, and with heads fitted to its features."""
        workspace, fit = self.inputs.workspace, self._fit
        evaluator, test = workspace.evaluator, workspace.data.test
        if fit is None:
            return [evaluator.row(name, parameters, test)]
        fitted = fit_heads(workspace, parameters, self._calibration, fit, self.inputs.method.seed)
        heads: dict[str, tuple[Evaluator, Kind]] = {
            name: (evaluator, "baseline"),
            f"{name}, heads {fit}": (evaluator.with_heads(fitted), "heads"),
        }
        return evaluator.rows_with_heads(parameters, test, heads)


def _count(data: Mapping[str, Examples]) -> int:
    return sum(map(len, data.values()))


def learned_row(inputs: LearningInputs, result: MergeResult, console: Console | None = None) -> Row:
    """Evaluates the learned merge on the test data; the console shows the time left."""
    coefficients = result.coefficients
    heads = "" if coefficients.heads == "kept" else f", heads {coefficients.heads}"
    evaluator, test = (
        inputs.workspace.evaluator.with_heads(result.heads),
        inputs.workspace.data.test,
    )
    general = inputs.workspace.general
    examples = _count(test) + (0 if general is None else len(general.test))
    show = count_silently if console is None else count_on(console)
    with evaluator.tally.shown(show, "the merge: examples", examples):
        return evaluator.row(
            f"learned ({coefficients.granularity}{heads})",
            result.parameters(inputs.theta_start),
            test,
            "learned",
        )


def _parameters_of_method(
    inputs: LearningInputs, chosen: MethodRecipe, console: Console | None
) -> Mapping[str, Array]:
    """Merges by a method with its own interference steps, in place of the recipe's."""
    method = make_method(chosen.name, chosen.options)
    in_words = choice_in_words(chosen.name, chosen.options)
    # Perhaps a second set of task vectors.
    deltas = _deltas_after(inputs, method.interference)
    merge = partial(method_parameters, inputs.workspace, method, inputs.base, deltas)
    if console is None:
        return merge()
    with console.status(in_words) as status:
        return merge(lambda line: status.update(f"{in_words}: {line}"))


def _deltas_after(inputs: LearningInputs, steps: Sequence[FittedStep]) -> Mapping[str, Delta]:
    """Returns the task vectors after these interference steps in place of the recipe's."""
    if not steps and not inputs.interference:
        return inputs.deltas
    memory = make_memory(inputs.method.memory, inputs.devices)
    models, dtype = inputs.workspace.models, inputs.method.delta_dtype
    return load_task_vectors(models, dtype, steps, memory)[0]


def _best_coefficient(inputs: LearningInputs, candidates: Sequence[float]) -> float:
    """Returns task arithmetic's best coefficient on the validation data, from coarse to fine."""
    evaluator, validation = inputs.workspace.evaluator, inputs.workspace.data.validation

    def cost(coefficient: float) -> float:
        merged = _merged(inputs, task_arithmetic(coefficient))
        scores = {t: evaluator.example_scores(merged, t, data) for t, data in validation.items()}
        return -Row.of_examples("", scores, evaluator.metric).score

    return lowest_from_coarse(cost, candidates)


def _merged(inputs: LearningInputs, method: MergeMethod) -> dict:
    return method_parameters(inputs.workspace, method, inputs.base, inputs.deltas)
