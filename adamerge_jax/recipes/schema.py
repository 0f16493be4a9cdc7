"""Recipes: typed YAML files that say what to merge, how to learn it and where the result goes.

Every field is documented by the string below it; the command line shows these with the defaults.
"""

import difflib
import inspect
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import optax
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adamerge_jax.checkpoints.folders import require_task_name
from adamerge_jax.coefficients.constraints import CONSTRAINTS
from adamerge_jax.coefficients.granularities import GRANULARITIES, make_granularity, require_whole
from adamerge_jax.errors import InputError
from adamerge_jax.interference import FittedStep, make_step
from adamerge_jax.learning import schedules
from adamerge_jax.models.rematerialization import Rematerialize
from adamerge_jax.objectives import Objective, make_objective, weighted_sum
from adamerge_jax.objectives.regularizers import Regularizer, make_regularizer
from adamerge_jax.recipes.presets import DEFAULT_PRESET, PRESETS, apply_preset
from adamerge_jax.registry import find_registered
from adamerge_jax.runs.tracking import TrackerName
from adamerge_jax.task_vectors.offload.memory import Place

Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """A part of a recipe; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


class _PathSection(Section):
    """A section that may be written as its path alone."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class ModelSource(_PathSection):
    """A Hugging Face checkpoint."""

    path: str
    """Folder, or id on the Hugging Face Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""


class DataSource(_PathSection):
    """Examples of one task."""

    path: str
    """JSONL, JSON, CSV, TSV, Parquet or .npz file, folder of images, or id of a data set on the
    Hub."""
    config: str | None = None
    """Configuration of a data set on the Hub."""
    split: str = "train"
    """Split of a data set on the Hub, or of a folder of images."""
    text: str | tuple[str, str] = "text"
    """Column of the text, or the two columns of a text pair."""
    prompt: str = "prompt"
    """Column of the prompt, for language models."""
    response: str = "response"
    """Column of the response to it."""
    messages: str = "messages"
    """Column of a conversation, a list of role and content, for the tokenizer's chat template. A
    language model's data has one of the three: messages, prompt and response, or text."""
    predict: Literal["response", "all"] = "response"
    """Which tokens of prompts with responses and of conversations count."""
    packed: bool = False
    """Whether to put a language model's texts one behind the other and cut them at max_length."""
    image: str = "image"
    """Column of the image."""
    label: str | None = None
    """Column of the class index; unlabeled without it."""
    limit: int | None = Field(default=None, ge=1)
    """Use at most this many examples, drawn with the recipe's seed."""


class TaskRecipe(Section):
    """One task: its expert and its data."""

    expert: ModelSource
    """The model fine-tuned on the task."""
    calibration: DataSource
    """Examples to learn coefficients from; labels are read only for objectives that need them."""
    validation: DataSource | None = None
    """Labelled examples to choose task arithmetic's single coefficient with."""
    test: DataSource | None = None
    """Labelled examples for the table of results."""
    class_names: list[str] | None = None
    """Names of the classes, for zero-shot heads; by default those that the data set carries."""
    templates: list[str] = ["a photo of a {}."]
    """Prompts with {} for the class name, for zero-shot heads."""


IMPORTANCE_CHUNK = "importance_chunk"
"""The granularity that is `chunk` with as many pieces as importance says."""


_ACROSS_ROWS = ("chunk", IMPORTANCE_CHUNK, "partition", "singular")


class CoarseRecipe(Section):
    """Coarser coefficients that are learned first."""

    granularity: Literal["task", "layer", "tensor"] = "tensor"
    """Which parameters share a coefficient."""
    steps: int = Field(default=100, ge=1)
    """Number of optimizer steps."""


class CoefficientsRecipe(Section):
    """What is learned."""

    granularity: str = "tensor"
    """Which parameters share a coefficient: task, layer, tensor, groups, row, column, head, chunk,
    importance_chunk, partition, singular, or package.module:function."""
    granularity_options: dict[str, Any] = {}
    """Arguments of the granularity, e.g. pieces of chunk."""
    constraint: Literal["free", "clip", "sigmoid", "softmax"] = "clip"
    """Which values coefficients may take."""
    initial: float | None = None
    """Where every coefficient starts; by default 0.3, or 1/K under softmax."""
    start: str | None = None
    """Coefficients file of an earlier run to start from instead, of any granularity. Experts are
    matched by name; one that the file does not know starts at initial. Or a .yaml file of mergekit,
    with the same models and one weight per tensor or coarser."""
    other_base: bool = False
    """Whether start may have been learned for another base: another version, or another size of
    the same family, whose layers are then matched by relative depth."""
    coarse: CoarseRecipe | None = None
    """Coarser coefficients that are learned first, from start where there is one, and from which
    these start."""


class InterferenceRecipe(Section):
    """One step of what is done to task vectors before mixing."""

    name: str
    """Which: trim, elect_sign, disjoint_mean or drop_and_rescale."""
    options: dict[str, Any] = {}
    """Its arguments, e.g. density of trim."""


class TaskVectorsRecipe(Section):
    """How task vectors are kept while coefficients are learned; the merge is exact all the same."""

    dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = None
    """Of what each expert changed; by default that of the weights. int8 rounds by a step for each
    row of a matrix, half of which is the largest error; LoRA factors then stay float32."""
    memory: Place = "device"
    """Where: device; host, the host's memory, from where the compiled step brings one expert's
    piece of one layer at a time; or disk, a temporary file (under TMPDIR) that it reads. With the
    last two, memory on the device does not grow with the number of experts. LoRA factors stay on
    the device."""


class ObjectiveRecipe(Section):
    """One term of what is minimised."""

    name: str
    """Which objective: entropy, logit_alignment, hidden_state_alignment, cross_entropy,
    pseudo_labels, or package.module:function."""
    weight: float | dict[str, float] = 1.0
    """Its factor in the sum, for all tasks or by task; tasks that are not named have none. Below 0
    the objective is raised: the task is to be forgotten."""
    options: dict[str, Any] = {}
    """Arguments of the objective, e.g. temperature of logit_alignment."""

    def weight_of(self, task: str) -> float:
        """Its factor for one task."""
        return self.weight.get(task, 0.0) if isinstance(self.weight, dict) else self.weight


class RegularizerRecipe(Section):
    """One term that keeps coefficients where they should be."""

    name: str
    """Which regularizer: distance, lp_norm, expert_entropy, or package.module:function."""
    weight: float = 1.0
    """Its factor in the sum."""
    options: dict[str, Any] = {}
    """Its arguments, e.g. p of distance."""


class OptimizerRecipe(Section):
    """How the objective is minimised."""

    name: str = "adam"
    """An optax optimizer, e.g. adam, adamw, sgd."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Step size; where a schedule starts."""
    schedule: str | None = None
    """An optax schedule, e.g. cosine_decay_schedule, or cosine_warm_restarts; by default the
    learning rate is constant."""
    schedule_options: dict[str, Any] = {}
    """Arguments of the schedule; decay_steps is by default the number of steps."""
    options: dict[str, Any] = {}
    """Further arguments of the optimizer, e.g. b1."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient."""

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optax transformation for so many steps.

        Raises:
            InputError: optax has no such optimizer or schedule, or refuses an option.
        """
        rate = self.learning_rate
        if self.schedule is not None:
            options = {"init_value": rate} | self.schedule_options
            modules = [schedules, optax.schedules]
            function = _find(modules, self.schedule)
            if function and "decay_steps" in inspect.signature(function).parameters:
                options = {"decay_steps": steps} | options
            rate = _call_optax("learning.optimizer.schedule", self.schedule, modules, options)
        if "learning_rate" in self.options:
            raise InputError(
                "learning.optimizer.options: learning_rate is a field of its own, "
                "learning.optimizer.learning_rate"
            )
        options = self.options | {"learning_rate": rate}
        field = "learning.optimizer.name"
        optimizer = _call_optax(field, self.name, [optax, optax.contrib], options)
        if not isinstance(optimizer, optax.GradientTransformation):
            raise InputError(f"{field}: optax.{self.name} is no optimizer; use e.g. adam")
        if self.clip_norm is None:
            return optimizer
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), optimizer)


class LearningRecipe(Section):
    """How long and on what."""

    steps: int = Field(default=500, ge=1)
    """Number of optimizer steps."""
    batch_size: int = Field(default=16, ge=1)
    """Examples of every task per step."""
    microbatches: int = Field(default=1, ge=1)
    """In how many equal parts a step runs its batch, one after the other: less memory for
    activations, the same coefficients."""
    examples: int | None = Field(default=None, ge=2)
    """Use at most so many calibration examples of each task, drawn with the recipe's seed."""
    held_out: float = Field(default=0.2, gt=0, lt=1)
    """Part of the calibration data that chooses which coefficients are kept."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between looks at the held-out part; by default a tenth of all steps."""
    control: float | None = Field(default=None, gt=0, le=1)
    """Where an objective has a weight below 0: learning stops before the agreement of one of the
    other tasks, with its labels or without any with its expert, on the held-out part falls below
    this fraction of where it started."""
    optimizer: OptimizerRecipe = OptimizerRecipe()
    rematerialize: Rematerialize = "elementwise"
    """What the backward pass computes again rather than keeps, from fastest to smallest."""


class EvaluationRecipe(Section):
    """How the table of results is made."""

    batch_size: int = Field(default=128, ge=1)
    """Examples per batch."""
    task_arithmetic: list[float] = Field(
        default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], min_length=1
    )
    """Coefficients that task arithmetic chooses from, where every task has validation data."""


class ExportRecipe(Section):
    """How the merged checkpoint is written."""

    dtype: Dtype | None = None
    """Of the weights; by default each tensor's in the base."""
    shard_megabytes: int = Field(default=5000, ge=1)
    """Largest size of one safetensors file."""
    orbax: bool = True
    """Whether to write the merged parameters as an Orbax checkpoint for JAX too, as large again."""
    adapter: bool = False
    """Whether to write the merge as one LoRA adapter of the base too, of the summed rank; exact
    where coefficients are per tensor or coarser, row, column or head, and every expert is an
    adapter."""


class DevicesRecipe(Section):
    """Where it runs."""

    model: int = Field(default=1, ge=1)
    """Devices among which every parameter and task vector is split; must divide their number.
    Examples are split among all devices anyway."""
    distributed: bool = False
    """Whether this is one of several processes, each started with this command, on one or several
    hosts. JAX detects Slurm, Kubernetes, Open MPI and TPU pods; elsewhere, give the next three."""
    coordinator: str | None = None
    """host:port of the first process."""
    processes: int | None = Field(default=None, ge=1)
    """Number of processes."""
    process: int | None = Field(default=None, ge=0)
    """Which of them this is, from 0."""


class Recipe(Section):
    """A merge: base, experts, data, coefficients, objective, optimizer, export.

    Made by `load_recipe` or `parse_recipe`, which fill in what the preset says and report mistakes
    in one line; its fields are those of the YAML file.

    Examples:
        >>> from adamerge_jax import parse_recipe
        >>> task = {"expert": "experts/law", "calibration": "law.jsonl"}
        >>> recipe = parse_recipe({"base": "model", "tasks": {"law": task}, "preset": "adamerging"})
        >>> recipe.coefficients.granularity, recipe.learning.steps, recipe.initial_coefficient
        ('tensor', 500, 0.3)
        >>> list(recipe.build_objectives())
        ['law']
    """

    name: str = "merge"
    """Name of the run; by default that of the file."""
    preset: str = DEFAULT_PRESET
    """Where all fields that a recipe leaves out come from: recommended, adamerging-task,
    adamerging, adamerging++, atlas, atlas-k, expert-merging or expert-merging++."""
    base: ModelSource
    """The model that all experts were fine-tuned from."""
    tasks: dict[str, TaskRecipe] = Field(min_length=1)
    """Tasks by name."""
    tokenizer: str | None = None
    """Whose tokenizer, chat template and generation settings the merge takes: base, or a task. By
    default those of the first model that has a tokenizer; then all must have its special tokens."""
    keep_from_base: list[str] = []
    """Name patterns of parameters that are not merged but stay the base's."""
    interference: list[InterferenceRecipe] = []
    """What is done to task vectors before mixing, step by step."""
    task_vectors: TaskVectorsRecipe = TaskVectorsRecipe()
    coefficients: CoefficientsRecipe = CoefficientsRecipe()
    objectives: list[ObjectiveRecipe] = Field(min_length=1)
    """Terms of what is minimised."""
    regularizers: list[RegularizerRecipe] = []
    """Terms that keep coefficients where they should be."""
    learning: LearningRecipe = LearningRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    export: ExportRecipe = ExportRecipe()
    devices: DevicesRecipe = DevicesRecipe()
    tracking: list[TrackerName] = []
    """Where the numbers of every step go beside metrics.jsonl: tensorboard, wandb."""
    max_length: int = Field(default=128, ge=2)
    """Longest text in tokens; longer ones are cut, and the run says how many."""
    dtype: Dtype | None = None
    """Of weights and activations while learning; by default the checkpoint's."""
    seed: int = Field(default=0, ge=0)
    """All randomness comes from it."""

    @property
    def initial_coefficient(self) -> float:
        """Where every coefficient starts."""
        if self.coefficients.initial is not None:
            return self.coefficients.initial
        return 1 / len(self.tasks) if self.coefficients.constraint == "softmax" else 0.3

    @property
    def own_keep_from_base(self) -> list[str]:
        """Patterns that must fit a parameter: not those of the preset, which is for any model."""
        return [each for each in self.keep_from_base if each not in self._kept_by_preset]

    @property
    def keeps_what_the_preset_keeps(self) -> bool:
        """Whether `keep_from_base` is the preset's list, and not one of the user's."""
        return self.keep_from_base == self._kept_by_preset

    @property
    def _kept_by_preset(self) -> list[str]:
        return PRESETS[self.preset].get("keep_from_base", [])

    def build_objectives(self) -> dict[str, Objective]:
        """What is minimised, by task.

        Raises:
            InputError: There is no such objective, or it refuses an option.
        """
        terms = [(term, make_objective(term.name, term.options)) for term in self.objectives]
        return {
            task: weighted_sum(
                [
                    (term.weight_of(task), objective)
                    for term, objective in terms
                    if term.weight_of(task)
                ]
            )
            for task in self.tasks
        }

    def build_regularizers(self) -> list[tuple[float, Regularizer]]:
        """What is added to the objective, with its weights.

        Raises:
            InputError: There is no such regularizer, or it refuses an option.
        """
        return [
            (term.weight, make_regularizer(term.name, term.options)) for term in self.regularizers
        ]

    def build_interference(self) -> list[FittedStep]:
        """What is done to task vectors before mixing.

        Raises:
            InputError: There is no such step, or it refuses an option.
        """
        steps = []
        for step in self.interference:
            drawn = {"seed": self.seed} if step.name == "drop_and_rescale" else {}
            steps.append(FittedStep(step.name, drawn | step.options))
            make_step(step.name, steps[-1].options)
        return steps

    @property
    def forgotten(self) -> list[str]:
        """Tasks for which some objective is to be raised."""
        return [t for t in self.tasks if any(term.weight_of(t) < 0 for term in self.objectives)]

    def require_sensible(self) -> None:
        """Refuses fields that do not go together, what names no function, and unknown options.

        Raises:
            InputError: Says which field, and what to change.
        """
        self._require_fields_that_go_together()
        self._require_options_of_granularity()
        self.learning.optimizer.build(self.learning.steps)
        self.build_regularizers()
        self.build_interference()
        objectives = self.build_objectives().values()
        if self.learning.microbatches > 1 and any(own.needs.whole_batch for own in objectives):
            raise InputError(
                "learning.microbatches: pseudo_labels, and hidden_state_alignment with relative, "
                "look at the whole batch; set it to 1, or choose another objective"
            )

    def _require_options_of_granularity(self) -> None:
        name, options = self.coefficients.granularity, self.coefficients.granularity_options
        if name == IMPORTANCE_CHUNK:
            require_whole("coefficients.granularity_options.budget", options["budget"], 1)
            return
        find_registered("coefficients.granularity", GRANULARITIES, name)
        # Without parameters only options are looked at; those of heads may be left to the model.
        if name in GRANULARITIES and (options or name != "head"):
            make_granularity(name, options, {})

    def _require_fields_that_go_together(self) -> None:
        for task in self.tasks:
            require_task_name(task)
        for field in ("coordinator", "processes", "process"):
            if getattr(self.devices, field) is not None and not self.devices.distributed:
                raise InputError(
                    f"devices.{field}: is for several processes; set devices.distributed, or leave "
                    "it out"
                )
        if "base" in self.tasks:
            raise InputError("tasks: no task can be called 'base'; rename it")
        constraint = CONSTRAINTS[self.coefficients.constraint]
        if not constraint.allows(np.full(len(self.tasks), self.initial_coefficient)):
            raise InputError(
                f"coefficients.initial: {self.initial_coefficient:g} is not {constraint.range}, "
                f"as the constraint {self.coefficients.constraint!r} asks; change one of the two"
            )
        for position, term in enumerate(self.objectives):
            unknown = set(term.weight) - set(self.tasks) if isinstance(term.weight, dict) else ()
            if unknown:
                raise InputError(
                    f"objectives.{position}.weight: {min(unknown)!r} is no task; "
                    f"the tasks are {', '.join(self.tasks)}"
                )
        if self.coefficients.other_base and self.coefficients.start is None:
            raise InputError(
                "coefficients.other_base: there is no coefficients.start that it allows; give one, "
                "or leave it out"
            )
        if self.learning.control is not None and not self.forgotten:
            raise InputError(
                "learning.control: nothing is to be forgotten; give the objective of a task a "
                "weight below 0, or leave it out"
            )
        if self.learning.control is not None and len(self.forgotten) == len(self.tasks):
            raise InputError(
                "learning.control: every task is to be forgotten, none is left to control"
            )
        learning = self.learning
        if learning.batch_size % learning.microbatches:
            raise InputError(
                f"learning.microbatches: {learning.microbatches} equal parts cannot be made of "
                f"learning.batch_size {learning.batch_size}; change one of the two"
            )
        granularity = self.coefficients.granularity
        if self.task_vectors.dtype == "int8" and granularity in _ACROSS_ROWS:
            raise InputError(
                "task_vectors.dtype: int8 has a step for each row, and the granularity "
                f"{granularity!r} takes rows apart; take row, column, head, tensor or a coarser "
                "one, or bfloat16 task vectors"
            )
        if self.coefficients.granularity == IMPORTANCE_CHUNK:
            if self.coefficients.coarse is None:
                raise InputError(
                    "coefficients.coarse: is missing; importance_chunk scores tensors by "
                    "coefficients that are learned first"
                )
            if list(self.coefficients.granularity_options) != ["budget"]:
                raise InputError(
                    "coefficients.granularity_options: importance_chunk takes one option, budget: "
                    "the largest number of coefficients"
                )


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 has it; to YAML 1.1 it is a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(text: str | bytes) -> Any:
    """What a text says in YAML.

    Raises:
        InputError: It is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"not valid YAML ({' '.join(str(error).split())})") from error


def load_recipe(path: Path | str, preset: str | None = None) -> Recipe:
    """Reads and validates a recipe.

    Args:
        path: A YAML file.
        preset: Takes the place of the preset that the file names.

    Raises:
        InputError: The file is missing, is not YAML, or a field is unknown, missing or wrong.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from adamerge_jax import load_recipe
        >>> text = '''
        ... base: google-bert/bert-base-uncased
        ... tasks:
        ...   sentiment: {expert: experts/sentiment, calibration: data/sentiment.jsonl}
        ... '''
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "reviews.yaml"
        ...     _ = file.write_text(text)
        ...     recipe = load_recipe(file)
        >>> recipe.name, recipe.preset, recipe.coefficients.granularity
        ('reviews', 'recommended', 'row')
    """
    chosen = {} if preset is None else {"preset": preset}
    file = Path(path)
    return parse_recipe({"name": file.stem} | read_fields(file) | chosen, str(path))


def read_fields(path: Path) -> dict[str, Any]:
    """Reads a recipe file without validating what it says.

    Raises:
        InputError: The file is missing or holds no YAML mapping.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such recipe; expected a YAML file")
    try:
        fields = read_yaml(path.read_bytes())
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: expected fields such as base and tasks, found {fields!r}")
    return fields


def parse_recipe(fields: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validates a recipe given as nested dictionaries.

    Args:
        fields: What a recipe's YAML file would hold.
        where: Begins the error message.

    Raises:
        InputError: A field is unknown, missing or wrong.

    Examples:
        >>> from adamerge_jax import InputError, parse_recipe
        >>> fields = {
        ...     "base": "google-bert/bert-base-uncased",
        ...     "tasks": {"law": {"expert": "experts/law", "calibration": "data/law.jsonl"}},
        ... }
        >>> parse_recipe(fields).learning.steps
        100
        >>> try:
        ...     parse_recipe(fields | {"lerning": {"steps": 10}})
        ... except InputError as error:
        ...     print(error)
        recipe: unknown field lerning; nearest valid name is 'learning'
    """
    try:
        recipe = Recipe.model_validate(apply_preset(fields))
        recipe.require_sensible()
    except ValidationError as error:
        raise InputError(f"{where}: {describe_validation_error(error)}") from error
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return recipe


def describe_validation_error(error: ValidationError) -> str:
    """The first problem in one line: the field, what was found, what was expected."""
    problem = error.errors()[0]
    field = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        *section, unknown = problem["loc"]
        known = _fields_at(section)
        nearest = difflib.get_close_matches(str(unknown), known, n=1, cutoff=0.0)
        message = f"unknown field {field}; nearest valid name is {nearest[0]!r}"
    elif problem["type"] == "missing":
        message = f"field {field} is missing"
    elif problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
    else:
        message = f"field {field}: found {problem['input']!r}; {problem['msg']}"
    others = error.error_count() - 1
    return message + (f" (and {others} more)" if others else "")


def _fields_at(location: list[str | int]) -> list[str]:
    """Names of the fields of the section at a location of the recipe."""
    section: type[BaseModel] = Recipe
    steps = iter(location)
    for step in steps:
        annotation = section.model_fields[step].annotation
        if get_origin(annotation) in (dict, list):
            next(steps)  # the key or the position
        candidates = [annotation, *get_args(annotation)]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)


def _call_optax(field: str, name: str, modules: list[Any], options: dict[str, Any]) -> Any:
    """Calls a function of optax by name."""
    function = _find(modules, name)
    if function is None:
        public = [n for module in modules for n in dir(module) if not n.startswith("_")]
        nearest = difflib.get_close_matches(name, public, n=1, cutoff=0.0)
        raise InputError(f"{field}: optax has no {name!r}; did you mean {nearest[0]!r}?")
    try:
        return function(**options)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{field}: optax.{name} says: {reason}") from error


def _find(modules: list[Any], name: str) -> Any:
    """The public function of that name in the first module that has one, or None."""
    found = (getattr(m, name) for m in modules if callable(getattr(m, name, None)))
    return None if name.startswith("_") else next(found, None)
