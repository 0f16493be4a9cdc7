"""EleutherAI's lm-evaluation-harness: its tasks, and a checkpoint's scores on them.

The package `lm_eval` is imported where it is used alone: it is optional, and slow to import.
"""

import difflib
import functools
import hashlib
import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from adamerge_jax.data.chat_templates import Chat, write_chats
from adamerge_jax.errors import InputError, in_one_line, shorten
from adamerge_jax.recipes.schema import LmEvalRecipe
from adamerge_jax.registry import require_allowed
from adamerge_jax.runs.harness import HarnessScore, HarnessTask

log = logging.getLogger(__name__)

FIELD = "lm_eval"

_RESAMPLES = 1000
"""Test sets that are drawn for the standard error of a metric that is no mean."""

_NEAREST = 3
"""The number of names that a message gives for one that the harness does not have."""


def require_harness(settings: LmEvalRecipe | None) -> None:
    """Refuses to evaluate by the harness where it is not installed.

    Raises:
        InputError: Says how to install it.
    """
    if settings is None:
        return
    for package in ("lm_eval", "torch", "peft", "accelerate"):
        if find_spec(package) is None:
            raise InputError(
                f"{FIELD}: needs the package {package}; install it with pip install "
                "'adamerge_jax[lm-eval]', or leave lm_eval out"
            )


class HarnessModel(NamedTuple):
    """A checkpoint to evaluate.

    Attributes:
        folder: The folder of its weights, those of the base for an adapter.
        adapter: The folder of an adapter.
        tokenizer: The folder of its tokenizer.
        chat_tokenizer: The folder of the tokenizer whose chat template writes prompts.
    """

    folder: Path
    tokenizer: Path
    adapter: Path | None = None
    chat_tokenizer: Path | None = None


class LoadedTasks(NamedTuple):
    """A task or a group of tasks of the harness, with its examples.

    Attributes:
        name: Its name.
        tasks: The harness's own objects.
        requests: The number of requests to a model.
        digest: A digest of all that is asked, and of the answers.
        higher_is_better: False where less is better by the first metric; None where the tasks do
            not say, or differ.
    """

    name: str
    tasks: Any
    requests: int
    digest: str
    higher_is_better: bool | None


class Harness:
    """The harness's tasks that a recipe asks for."""

    def __init__(self, settings: LmEvalRecipe, root: Path):
        """Looks up the names of the tasks; reads no data and runs no code of theirs.

        Args:
            settings: The settings of the recipe.
            root: Folder that relative paths start from.

        Raises:
            InputError: There is no such task, it runs code that a model writes, or tasks of
                somebody's own are not allowed.
        """
        folders = []
        if settings.include_path is not None:
            require_allowed(f"{FIELD}.include_path", settings.own_tasks or "")
            folders.append(root / Path(settings.include_path).expanduser())
            if not folders[0].is_dir():
                raise InputError(
                    f"{FIELD}.include_path: {settings.include_path} is no folder; give the folder "
                    "of your tasks' YAML files"
                )
        self.settings = settings
        self._own_code = [_digest_of_folder(folder) for folder in folders]
        self._manager = _make_manager(tuple(folders))
        for name in settings.tasks:
            _require_known(name, self._manager.task_index)
            for part in _parts(name, self._manager.task_index):
                if (part.cfg or {}).get("unsafe_code"):
                    raise InputError(
                        f"{FIELD}: {part.name} runs code that the model writes; evaluate the "
                        "checkpoint on it with lm_eval itself, where such code can do no harm"
                    )

    @property
    def facts(self) -> list[Any]:
        """The settings, code and versions that decide on scores, as JSON."""
        settings = self.settings
        packages = ("lm_eval", "torch", "transformers", "peft", "tokenizers")
        return [
            [settings.limit, settings.num_fewshot, settings.batch_size, settings.chat_template],
            self._own_code,
            [version(package) for package in packages],
            _device(),
        ]

    def load(self, name: str) -> LoadedTasks:
        """Loads a task or a group with its examples, from the network where need be.

        Raises:
            InputError: It cannot be loaded.
        """
        with _quietly(), _in_one_line(f"the task {name!r} cannot be loaded"):
            tasks = self._manager.load([name])
            digest, requests, directions = hashlib.sha256(), 0, set()
            for task_name, task in tasks["tasks"].items():
                if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                    raise ValueError("it is not for models of text alone, or runs a model's code")
                self._set_shots(task)
                directions.add(next(iter(task.higher_is_better().values()), None))
                task.build_all_requests(limit=self.settings.limit, rank=0, world_size=1)
                for instance in task.instances:
                    requests += instance.repeats or 1
                    asked = [task_name, instance.request_type, instance.args, instance.doc]
                    digest.update(json.dumps(asked, sort_keys=True, default=str).encode())
        direction = directions.pop() if len(directions) == 1 else None
        return LoadedTasks(name, tasks, requests, digest.hexdigest(), direction)

    def _set_shots(self, task: Any) -> None:
        """Sets the number of solved examples as the harness's command does, and their seed."""
        from lm_eval.defaults import DEFAULT_OTHER_SEED

        shots, default = self.settings.num_fewshot, task.get_config("num_fewshot")
        if shots is not None and default != 0:  # 0 is that of a task that cannot have any
            task.set_config(key="num_fewshot", value=shots)
        elif default is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)

    def open_model(
        self, model: HarnessModel, on_request: Callable[[], object] = lambda: None
    ) -> Any:
        """Loads a checkpoint as a model of the harness.

        Args:
            model: The checkpoint.
            on_request: The function that is called with each request that it has answered.

        Raises:
            InputError: `transformers` cannot load it.
        """
        with _quietly(), _in_one_line(f"{model.adapter or model.folder} cannot be loaded"):
            return _model_class()(
                model.chat_tokenizer,
                on_request,
                pretrained=str(model.folder.absolute()),
                tokenizer=str(model.tokenizer.absolute()),
                peft=None if model.adapter is None else str(model.adapter.absolute()),
                device=_device(),
                batch_size=self.settings.batch_size,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
            )

    def evaluate(self, model: Any, loaded: LoadedTasks) -> list[HarnessTask]:
        """Evaluates a model.

        Args:
            model: What `open_model` returned.
            loaded: The tasks.

        Returns:
            The scores of a task, or of a group and then of its parts.

        Raises:
            InputError: The model or the task fails.
        """
        from lm_eval import evaluate

        with _quietly(), _in_one_line(f"the task {loaded.name!r} fails"):
            for task in loaded.tasks["tasks"].values():
                self._set_shots(task)
            _set_seeds()
            results = evaluate(
                model,
                loaded.tasks,
                limit=self.settings.limit,
                bootstrap_iters=_RESAMPLES,
                log_samples=False,
                apply_chat_template=self.settings.chat_template,
                fewshot_as_multiturn=self.settings.chat_template,
            )
            return _read_scores(loaded.name, results)


@functools.cache
def _make_manager(folders: tuple[Path, ...]) -> Any:
    """Returns the harness's index of its own tasks and of those in folders, which win."""
    from lm_eval.tasks import TaskManager

    # Without the model's path among its metadata: tasks that write their prompts with a tokenizer
    # would open that one, and let it run code.
    return TaskManager(include_path=list(folders))


def _require_known(name: str, index: Mapping[str, Any]) -> None:
    # A name that the harness does not have would be taken for the path of a file with code.
    if name in index:
        return
    near = difflib.get_close_matches(name, index, n=_NEAREST, cutoff=0.0)
    raise InputError(
        f"{FIELD}: lm-eval {version('lm_eval')} has no task {shorten(name)!r}; near names are "
        f"{', '.join(near)} (lm_eval ls tasks has all)"
    )


def _parts(name: str, index: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the index's entries of a task, or of the tasks of a group or a tag."""
    seen, waiting = set(), [name]
    while waiting:
        name = waiting.pop()
        entry = index.get(name)
        if entry is None or name in seen:
            continue
        seen.add(name)
        yield entry
        members = (entry.cfg or {}).get("task")
        waiting += sorted(entry.tags) if entry.cfg is None else _names(members)


def _names(members: Any) -> list[str]:
    """Returns the names that a group gives its members, in lists and mappings of any depth."""
    if isinstance(members, str):
        return [members]
    if isinstance(members, Mapping):
        return [*_names(members.get("task")), *_names(members.get("group"))]
    return [n for member in members or () for n in _names(member)]


def _digest_of_folder(folder: Path) -> str:
    """Returns a digest of the files of a folder of tasks, data that lie elsewhere not included."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{file.relative_to(folder)}\0{content}\n".encode())
    return digest.hexdigest()


def _device() -> str:
    """Returns the name that PyTorch has for the kind of device that the merge is made on."""
    import jax
    import torch

    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"


def _set_seeds() -> None:
    """Sets the seeds of all that draws, as the harness's command does."""
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)


@functools.cache
def _model_class() -> type:
    """Returns the class of the harness's models, without bars and with chat templates in bounds."""
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        """A model of the harness that tells of each request that it has answered."""

        def __init__(
            self, chat_tokenizer: Path | None, on_request: Callable[[], object], **options: Any
        ):
            super().__init__(**options)
            self._chat_tokenizer = chat_tokenizer
            self.set_cache_hook(_RequestHook(on_request))

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = True, **options: Any
        ) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

        def apply_chat_template(
            self, chat_history: Sequence[Any], add_generation_prompt: bool = True
        ) -> str:
            """Writes a conversation by a program of a stranger's, in a process of its own."""
            return _write_chat(self._chat_tokenizer, chat_history, add_generation_prompt)

    return Model


class _RequestHook:
    """The harness's hook for answers that are to be kept, here for counting them."""

    def __init__(self, on_request: Callable[[], object]):
        self._on_request = on_request

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Is called with each request that has been answered."""
        self._on_request()


def _write_chat(tokenizer: Path | None, messages: Sequence[Any], asked: bool) -> str:
    """Writes a conversation; one that the assistant is to go on with ends with its last message."""
    assert tokenizer is not None  # a recipe that asks for conversations has it
    text = write_chats(_chat_tokenizer(tokenizer), [Chat(list(messages), asked)])[0]
    if asked:
        return text
    last = messages[-1]["content"]
    if last not in text:
        raise ValueError("the chat template leaves out the beginning of the assistant's answer")
    return text[: text.rindex(last) + len(last)]


@functools.cache
def _chat_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


@contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Turns any failure of the harness into one line: tasks and models may fail in any way."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        log.info("lm-eval failed", exc_info=True)
        raise InputError(
            f"{FIELD}: {what} ({type(error).__name__}: {in_one_line(error)})"
        ) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps the harness from showing bars of its own, and from forking this process.

    What it and the Hub's client log below errors is shown with `--verbose` alone: each try of a
    download that fails, and that other settings than the task's are used.
    """
    import datasets
    import lm_eval.api.task as task_module
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {_NO_PROCESSES: "1"}))
        silent = functools.partial(task_module.tqdm, disable=True)
        stack.enter_context(mock.patch.object(task_module, "tqdm", silent))
        for name in ("lm_eval", "huggingface_hub", "datasets"):
            logger = logging.getLogger(name)
            if not log.isEnabledFor(logging.INFO):
                stack.callback(logger.setLevel, logger.level)
                logger.setLevel(logging.ERROR)
        yield


_NO_PROCESSES = "DISABLE_MULTIPROC"
"""The variable that keeps standard errors from being computed in forked processes: those of a
process that has used JAX may hang."""


def _read_scores(name: str, results: Mapping[str, Any]) -> list[HarnessTask]:
    """Reads the harness's results of a task, a group or a tag."""
    groups = results.get("group_subtasks", {})
    shown = _shown(name, results, groups) or list(results["results"])
    tasks = []
    for task, numbers in results["results"].items():
        better = results.get("higher_is_better", {}).get(task) or {}
        scores = []
        for key, value in numbers.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = numbers.get(f"{metric}_stderr,{filter_name}")
            scores.append(
                HarnessScore(
                    metric=metric,
                    filter=filter_name,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    higher_is_better=better.get(metric),
                )
            )
        if scores:
            tasks.append(_task(task, scores, results, is_shown=task in shown))
    if not tasks:
        raise ValueError("it gives no score")
    return sorted(tasks, key=lambda task: not task.shown)


def _task(
    name: str, scores: list[HarnessScore], results: Mapping[str, Any], *, is_shown: bool
) -> HarnessTask:
    shots, task_version = results["n-shot"].get(name), results["versions"].get(name)
    return HarnessTask(
        name=name,
        shown=is_shown,
        shots=shots if isinstance(shots, int) else None,
        examples=results.get("n-samples", {}).get(name, {}).get("effective"),
        version=None if task_version is None else str(task_version),
        scores=scores,
    )


def _shown(name: str, results: Mapping[str, Any], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns the tasks to show for a name: itself if it has scores, else its parts."""
    numbers = results["results"].get(name, {})
    if any("," in key for key in numbers):
        return [name]
    return [shown for part in groups.get(name, ()) for shown in _shown(part, results, groups)]
