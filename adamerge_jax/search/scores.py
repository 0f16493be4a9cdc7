"""The scores by which a search chooses: of validation data, of a command, or by lm-eval."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Array
from rich.console import Console

from adamerge_jax.errors import InputError
from adamerge_jax.evaluation.embedding_scores import embedding_metric
from adamerge_jax.evaluation.harness import Harness, HarnessModel
from adamerge_jax.files.writing import partial_path, remove_folder
from adamerge_jax.models.problem import CLASSES
from adamerge_jax.objectives import Targets, TaskOutputs, make_objective
from adamerge_jax.pipeline.export import CHECKPOINT_FOLDER, ExportJob, export
from adamerge_jax.pipeline.workspace import Workspace
from adamerge_jax.runs.harness import HarnessTask
from adamerge_jax.runs.rows import OF_EACH_TASK, Metric
from adamerge_jax.search.candidates import Candidates, Point
from adamerge_jax.search.score_command import run_command

Parameters = Mapping[str, Array]


class Score(NamedTuple):
    """A score of merges.

    Attributes:
        words: Its name in messages and figures.
        maximise: True where more is better.
        measure: The function `(candidates, point) -> scores by task`; of a command, one score by
            the name `command`; of lm-eval one by each of its tasks.
    """

    words: str
    maximise: bool
    measure: Callable[[Candidates, Point], dict[str, float]]

    def mean(self, tasks: Mapping[str, float]) -> float:
        """Returns the score of all tasks: the mean."""
        return float(np.mean(list(tasks.values())))

    def signed(self, score: float) -> float:
        """Returns a score such that more is better; -inf where it is not finite."""
        if not np.isfinite(score):
            return -np.inf
        return score if self.maximise else -score


def _always(workspace: Workspace, task: str) -> bool:
    return True


class TaskScore(NamedTuple):
    """A score of one model on one task's validation data.

    Attributes:
        words: Its name in messages and figures.
        maximise: True where more is better.
        of: The function `(workspace, parameters of the backbone, task) -> score`.
        has: The function `(workspace, task) -> True` where the task has such a score.
    """

    words: str
    maximise: bool
    of: Callable[[Workspace, Parameters, str], float]
    has: Callable[[Workspace, str], bool] = _always

    def tasks(
        self, workspace: Workspace, field: str, wanted: Sequence[str] | None = None
    ) -> list[str]:
        """Returns the tasks whose scores count.

        Args:
            workspace: The models and the data.
            field: The field of the recipe that asks for the score, for messages.
            wanted: Some tasks; None for all that have the score.

        Raises:
            InputError: A task that is wanted is none, or does not have the score; or none has.
        """
        tasks = list(workspace.models.experts)
        having = [task for task in tasks if self.has(workspace, task)]
        for task in wanted or ():
            if task not in tasks:
                raise InputError(f"{field}: {task!r} is no task; the tasks are {', '.join(tasks)}")
            if task not in having:
                raise InputError(
                    f"{field}: {task} has no {self.words}; of exact match it needs prompts with "
                    "responses of at most 16 tokens, or evaluation.exact_match"
                )
        if not having:
            raise InputError(
                f"{field}: no task has {self.words}; it needs prompts with responses of at most 16 "
                "tokens, or evaluation.exact_match, and a model that writes"
            )
        return having if wanted is None else [task for task in tasks if task in wanted]


def _metric(workspace: Workspace, parameters: Parameters, task: str) -> float:
    return workspace.evaluator.score(parameters, task, workspace.data.validation[task])


def _loss(workspace: Workspace, parameters: Parameters, task: str) -> float:
    examples = workspace.data.validation[task]
    if workspace.models.family.language:
        return workspace.evaluator.score(parameters, task, examples)
    loss = make_objective(workspace.models.problems[task].loss, {})
    total = 0.0
    for index, logits in workspace.evaluator.batches(parameters, task, examples):
        length = logits.shape[1]
        labels, counted = examples.take_labels(index, length), examples.take_counted(index, length)
        losses = loss.value(TaskOutputs(logits), Targets(labels=labels, counted=counted))
        total += float(np.asarray(losses, np.float64).sum())
    return total / len(examples)


def _exact_match(workspace: Workspace, parameters: Parameters, task: str) -> float:
    examples = workspace.data.validation[task]
    return workspace.evaluator.answer_scores(parameters, examples, f"answers on {task}").mean


def _is_asked(workspace: Workspace, task: str) -> bool:
    return workspace.evaluator.is_asked(workspace.data.validation[task])


_TASK_SCORES = {
    "accuracy": TaskScore("accuracy", True, _metric),
    OF_EACH_TASK: TaskScore("score of each task", True, _metric),
    "spearman": TaskScore("Spearman's correlation", True, _metric),
    "recall": TaskScore("recall at 1", True, _metric),
    "loss": TaskScore("loss", False, _loss),
    "exact_match": TaskScore("exact match", True, _exact_match, _is_asked),
}


_OF_PAIRS: Mapping[Metric, str] = {"spearman": "spearman", "recall_at_1": "recall"}
"""The scores of sentence embedders by the first metric of their examples."""


def task_score(name: str | None, workspace: Workspace, section: str) -> TaskScore:
    """Returns a score on the validation data of each task.

    Args:
        name: A key of the scores, or None for the one that these models have.
        workspace: The models and the data.
        section: The recipe's section, for messages.

    Raises:
        InputError: There is no validation data, or the models have no such score.
    """
    family = workspace.models.family
    language = family.language
    if not workspace.data.validation:
        task = next(iter(workspace.models.experts))
        raise InputError(
            f"tasks.{task}.validation: is missing; merges are scored on validation data, never on "
            "test data: give it for every task"
            + (", or search.lm_eval, or a --score-command" if section == "search" else "")
        )
    of_pairs = None
    if family.embeds is not None:
        first = next(iter(workspace.data.validation.values()))
        of_pairs = _OF_PAIRS[embedding_metric(first)]
    if name is not None and (name in _OF_PAIRS.values() or of_pairs) and name != of_pairs:
        given = of_pairs or "classes or tokens"
        raise InputError(
            f"{section}.score: found {name}, and these models and their validation data have "
            f"{given}; leave it out"
        )
    others = {task: p for task, p in workspace.models.problems.items() if p != CLASSES}
    if name == "accuracy" and others:
        task, problem = next(iter(others.items()))
        raise InputError(
            f"{section}.score: accuracy is of classes of examples, and the expert of {task!r} "
            f"gives {problem.predicts}; leave it out: each task then has its own score"
        )
    if name == "accuracy" and language:
        raise InputError(
            f"{section}.score: accuracy is of classes, and a language model has none; take loss or "
            "exact_match"
        )
    if name == "exact_match" and not language:
        raise InputError(
            f"{section}.score: exact_match is of answers, and these models give classes; take "
            "accuracy or loss"
        )
    usual = "loss" if language else OF_EACH_TASK if others else "accuracy"
    return _TASK_SCORES[name or of_pairs or usual]


def on_validation_data(of_task: TaskScore, workspace: Workspace, tasks: Sequence[str]) -> Score:
    """Returns the score of a merge on the validation data of some tasks."""

    def measure(candidates: Candidates, point: Point) -> dict[str, float]:
        parameters = candidates.parameters(point)
        return {task: of_task.of(workspace, parameters, task) for task in tasks}

    words = f"{of_task.words} on the validation data"
    if len(tasks) < len(workspace.models.experts):
        words += f" of {', '.join(tasks)}"
    return Score(words, of_task.maximise, measure)


def of_command(
    words: list[str],
    timeout: float,
    maximise: bool,
    job_of: Callable[..., ExportJob],
    out: Path,
) -> Score:
    """Returns the score of a merge that a command prints for its checkpoint.

    Args:
        words: The words of the command; see `split_command`.
        timeout: The number of seconds that it may take.
        maximise: True where more is better.
        job_of: The function from coefficients to their export.
        out: The folder that gets the checkpoint, under another name while the command runs.
    """

    def measure(candidates: Candidates, point: Point) -> dict[str, float]:
        with _written(job_of, candidates, point, out) as checkpoint:
            return {"command": run_command(words, checkpoint, timeout)}

    return Score(f"number printed by {words[0]}", maximise, measure)


def of_harness(harness: Harness, job_of: Callable[..., ExportJob], out: Path) -> Score:
    """Returns the score of a merge's checkpoint by lm-evaluation-harness.

    Args:
        harness: The tasks; the score of each is that by its first metric.
        job_of: The function from coefficients to their export.
        out: The folder that gets the checkpoint, under another name while it is evaluated.

    Raises:
        InputError: A task cannot be loaded, or more is better by the metric of one and less by that
            of another.
    """
    names = ", ".join(harness.settings.tasks)
    loaded = [harness.load(name) for name in harness.settings.tasks]
    directions = {tasks.higher_is_better for tasks in loaded}
    if len(directions) > 1 or None in directions:
        raise InputError(
            f"search.lm_eval: more is not better by the first metric of all of {names}, nor less; "
            "search by those of one kind, or by --score-command"
        )

    def measure(candidates: Candidates, point: Point) -> dict[str, float]:
        with _written(job_of, candidates, point, out) as checkpoint:
            chat = checkpoint if harness.settings.chat_template else None
            source = HarnessModel(checkpoint, checkpoint, chat_tokenizer=chat)
            model = harness.open_model(source)
            return {tasks.name: _first_score(harness.evaluate(model, tasks)) for tasks in loaded}

    return Score(f"lm-eval's score on {names}", directions.pop() is True, measure)


def _first_score(tasks: Sequence[HarnessTask]) -> float:
    """Returns the mean score by the first metric, over a task or the shown parts of a group."""
    values = [task.scores[0].value for task in tasks if task.shown]
    return float(np.mean([np.nan if value is None else value for value in values]))


@contextmanager
def _written(
    job_of: Callable[..., ExportJob], candidates: Candidates, point: Point, out: Path
) -> Iterator[Path]:
    """Yields the folder of a merge's checkpoint, which is removed again."""
    folder = partial_path(out / "candidate")
    folder.mkdir(parents=True)
    try:
        export(job_of(candidates.coefficients(point, 0)), folder, Console(quiet=True))
        yield folder / CHECKPOINT_FOLDER
    finally:
        remove_folder(folder)
