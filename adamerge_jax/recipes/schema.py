"""Recipes: typed YAML files that say what to merge, how to learn it and where the result goes.

Every field is documented by the string below it; the command line shows these with the defaults.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from adamerge_jax.recipes.presets import DEFAULT_PRESET, PRESETS

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
    memory: Literal["device", "host", "disk"] = "device"
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
    rematerialize: Literal["nothing", "weights", "elementwise", "layer"] = "elementwise"
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
    tracking: list[Literal["tensorboard", "wandb"]] = []
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
    def to_fold(self) -> "Recipe":
        """The recipe for coefficients of a file, which says itself what is merged.

        A preset keeps tensors from learning, perhaps another one than the file was learned with;
        a `keep_from_base` of the user's own counts here too.
        """
        if self.keep_from_base != self._kept_by_preset:
            return self
        return self.model_copy(update={"keep_from_base": []})

    @property
    def _kept_by_preset(self) -> list[str]:
        return PRESETS[self.preset].get("keep_from_base", [])

    @property
    def forgotten(self) -> list[str]:
        """Tasks for which some objective is to be raised."""
        return [t for t in self.tasks if any(term.weight_of(t) < 0 for term in self.objectives)]
