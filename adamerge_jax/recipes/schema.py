"""The fields of a recipe: models, data, coefficients, objectives, learning and export.

Every field is documented by the string below it; the command line shows these with the defaults.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    model_validator,
)

from adamerge_jax.checkpoints.finite import LARGEST
from adamerge_jax.checkpoints.folders import require_possible_path
from adamerge_jax.errors import InputError
from adamerge_jax.recipes.presets import DEFAULT_PRESET, PRESETS
from adamerge_jax.registry import is_own_code

Dtype = Literal["float32", "bfloat16", "float16"]


def _refuse_truth(value: Any) -> Any:
    """Refuses true and false, which are 1 and 0 to Python."""
    if isinstance(value, bool):
        raise ValueError(f"found {value}, expected a number")
    return value


Whole = Annotated[int, BeforeValidator(_refuse_truth)]
"""A whole number."""

Number = Annotated[float, BeforeValidator(_refuse_truth)]
"""Any number."""

Count = Annotated[Whole, Field(ge=1, le=10**9)]
"""A number of steps, examples, devices and the like."""

AUTO = "auto"
"""The word for a value that a run picks for itself, of `AUTOMATIC_FIELDS`."""

if TYPE_CHECKING:
    PickedCount = int  # a recipe that is read has the value that `auto` begins with
else:
    PickedCount = Count | Literal["auto"]

Side = Annotated[Whole, Field(ge=1, le=2**14)]
"""A number of pixels."""

Weight = Annotated[Number, Field(ge=-1e6, le=1e6)]
"""A factor of a term in a sum."""

PathText = Annotated[str, AfterValidator(require_possible_path)]
"""A path, or an id on the Hub."""


def _nothing(value: Any) -> Any:
    """Returns None for the word `none`."""
    return None if value == "none" else value


SWITCHED_OFF = BeforeValidator(_nothing)
"""The word `none` for no section, beside YAML's null; the command line knows it by this mark."""


class Section(BaseModel):
    """A part of a recipe; unknown fields are refused, and numbers that float32 does not have.

    Attributes:
        SHORTHAND: The field that a section written as one word has; None for a section that is
            written with its fields.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)

    SHORTHAND: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: Any) -> Any:
        is_word = cls.SHORTHAND is not None and isinstance(value, str)
        return {cls.SHORTHAND: value} if is_word else value

    @model_validator(mode="after")
    def _require_float32(self) -> "Section":
        for name in type(self).model_fields:
            _require_float32(name, getattr(self, name))
        return self


def _require_float32(name: str, value: Any) -> None:
    """Refuses NaN, infinity and numbers that float32 does not have, also within options."""
    if isinstance(value, Mapping):
        for key, member in value.items():
            _require_float32(f"{name}.{key}", member)
    elif isinstance(value, list | tuple):
        for position, member in enumerate(value):
            _require_float32(f"{name}.{position}", member)
    elif isinstance(value, int | float) and value and not _SMALLEST <= abs(value) <= LARGEST:
        raise ValueError(f"{name} is {value:g}, expected a number that float32 has")


_SMALLEST = 2.0**-126
"""The smallest number over 0 that float32 has in full."""


class _PathSection(Section):
    """A section that may be written as its path alone."""

    SHORTHAND = "path"


class ModelSource(_PathSection):
    """A Hugging Face checkpoint."""

    path: PathText
    """Folder, or id on the Hugging Face Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""


class DataSource(_PathSection):
    """The examples of one task."""

    path: PathText
    """File of a table (.jsonl, .ndjson, .json, .csv, .tsv and .txt, also compressed as .gz, .bz2 or
    .xz; .parquet, .arrow), .npz file, folder of images, of tables or of `save_to_disk`, or id of a
    data set on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of a data set on the Hub."""
    config: str | None = None
    """Configuration of a data set on the Hub, or of a clone of it."""
    split: str = "train"
    """Split of a data set on the Hub, or of a folder with several."""
    text: str | tuple[str, str] = "text"
    """Column of the text, or the two columns of a text pair; a sentence embedder reads each text of
    it by itself. Of experts that classify words it is the column of lists of words, by default
    tokens where there is no column text."""
    choices: str | list[str] | None = None
    """Column of lists of choices, or the column of each choice, for experts of multiple choice. A
    choice is read behind the text; with two columns of text the second one stands before each."""
    prompt: str = "prompt"
    """Column of the prompt, for language models."""
    response: str = "response"
    """Column of the response to it."""
    messages: str = "messages"
    """Column of a conversation, a list of role and content, for the tokenizer's chat template. A
    language model's data has one of the three: messages, prompt and response, or text."""
    predict: Literal["response", "all"] = "response"
    """Tokens that count in prompts with responses and in conversations: the response's, or all."""
    end_of_text: Literal["auto", "append", "leave"] = "auto"
    """End of a language model's texts and responses. append: it is to be predicted; that is the
    tokenizer's eos_token behind a text or response, and in a conversation what the chat template
    writes behind a response. leave: it is not. auto: append where the task's expert predicts it on
    a few calibration examples; in conversations leave. All data of a task have the same."""
    packed: bool = False
    """Join a language model's texts and cut the result into pieces of max_length tokens."""
    image: str = "image"
    """Column of the image."""
    label: str | None = None
    """Column of the class index or of the class's name, of lists of these for words and for labels
    that do not exclude each other, of numbers, or of the right choice; unlabeled without it. Of a
    sentence embedder's pairs it is that of their score; without it each second text is to be
    found."""
    limit: Count | None = None
    """Largest number of examples, drawn with the recipe's seed."""


class TaskRecipe(Section):
    """A task: its expert and its data."""

    expert: ModelSource
    """The model fine-tuned on the task."""
    calibration: DataSource | None = None
    """Examples to learn coefficients from; labels are read only for objectives that need them. A
    merge without learning needs none."""
    validation: Annotated[DataSource | None, SWITCHED_OFF] = None
    """Labelled examples that choose task arithmetic's single coefficient; of sentence embedders
    pairs."""
    test: Annotated[DataSource | None, SWITCHED_OFF] = None
    """Labelled examples for the table of results; of sentence embedders pairs."""
    class_names: list[str] | None = None
    """Names of the classes in the order of the model's outputs, to which the data's names are
    matched; by default those in the expert's config.json, and for zero-shot heads the data's."""
    templates: list[str] = ["a photo of a {}."]
    """Prompts with {} for the class name, for zero-shot heads."""

    def source(self, part: str) -> DataSource | None:
        """Returns the data of a part, with the end of text that any part names.

        Args:
            part: `calibration`, `validation` or `test`.
        """
        source = getattr(self, part)
        if source is None or not (ends := self.named_ends):
            return source
        return source.model_copy(update={"end_of_text": next(iter(ends.values()))})

    @property
    def named_ends(self) -> dict[str, str]:
        """The `end_of_text` of each part of the data that names one."""
        parts = {"calibration": self.calibration, "validation": self.validation, "test": self.test}
        return {
            part: source.end_of_text
            for part, source in parts.items()
            if source is not None and source.end_of_text != "auto"
        }


class RetainRecipe(DataSource):
    """General text on which the merge is to stay as the base is."""

    path: PathText | None = None
    """As for the data of tasks, without labels: conversations or prompts for chat models, whose
    answers the base writes where there are none, else texts. By default a chat model (one with
    conversations among its calibration data) uses 300 general prompts that come with the package;
    other models use nothing."""
    weight: Number = Field(default=1.0, ge=0, le=1e6)
    """Factor of the divergence from the base in the sum over tasks; with 0 it is only measured."""
    new_tokens: Count = 24
    """Largest number of tokens that the base writes behind a prompt without an answer."""


class CoarseRecipe(Section):
    """A coarser set of coefficients that is learned first."""

    granularity: Literal["task", "layer", "tensor"] = "tensor"
    """Parameters that share a coefficient."""
    steps: Count = 100
    """Number of optimizer steps."""


class MethodRecipe(Section):
    """A merge without learning."""

    name: str
    """Name of the method (docs/guides/methods.md has all), or package.module:function."""
    options: dict[str, Any] = {}
    """Arguments of the method, e.g. density of ties."""


class CoefficientsRecipe(Section):
    """The coefficients that are learned."""

    granularity: str = "tensor"
    """Parameters that share a coefficient: task, layer, tensor, groups, row, column, row_column,
    head, chunk, importance_chunk, partition, singular, entry, or package.module:function. auto:
    row_column for language models whose experts are all adapters, row for others."""
    granularity_options: dict[str, Any] = {}
    """Arguments of the granularity, e.g. pieces of chunk."""
    constraint: Literal[
        "free",
        "clip",
        "sigmoid",
        "softmax",
        "simplex",
        "simplex_with_base",
        "positions",
        "binary",
        "concrete",
    ] = "clip"
    """Values that coefficients may take."""
    initial: Weight | Literal["auto"] | None = None
    """Value at which every coefficient starts. auto: the one from 0.05 to 1 whose merge has the
    lowest objective on the held-out calibration data; where a value follows from the constraint or
    the initial merge, that. By default 0.3, for K experts 1/K under softmax and
    simplex, and 1/(K+1) under simplex_with_base and positions; 0 with initial_merge."""
    initial_merge: Annotated[MethodRecipe | None, SWITCHED_OFF] = None
    """Merge without learning to which the task vectors are added in place of the base, so that
    learning starts from it: the method's name and options."""
    start: PathText | None = None
    """Coefficients file of an earlier run, or the run folder, to start from instead, of any
    granularity. Experts are matched by name; an expert that is not in the file starts at initial.
    Or a .yaml file of mergekit with the same models and one weight per tensor or coarser."""
    other_base: bool = False
    """Allow a start that was learned for another base: another version, or another size of the
    same family, whose layers are then matched by relative depth."""
    coarse: Annotated[CoarseRecipe | None, SWITCHED_OFF] = None
    """Coarser coefficients that are learned first, from start if it is given; learning then starts
    from them."""


HeadKind = Literal["kept", "scaled", "refitted", "learned"]
"""A way of making the heads of a merge."""


class HeadsRecipe(Section):
    """The heads of classifiers, which each task has for itself."""

    SHORTHAND = "kind"

    kind: HeadKind = "kept"
    """kept: the experts' own. scaled: a scale and a bias for each class, fitted to the expert's
    logits on the calibration data after learning. refitted: the last layer, fitted so. learned: the
    last layer, learned together with the coefficients, then fitted."""
    learning_rate: Number = Field(default=0.05, gt=0)
    """Step size of learned heads, by Adam, as a part of the head's size; it decays to 0 by a
    cosine."""
    ridge: Number = Field(default=0.0, ge=0, le=1e6)
    """Weight of the distance of learned heads from the experts' own, relative to their size."""


class InterferenceRecipe(Section):
    """A step that changes task vectors before mixing."""

    name: str
    """Name of the step: trim, elect_sign, disjoint_mean or drop_and_rescale."""
    options: dict[str, Any] = {}
    """Arguments of the step, e.g. density of trim."""


class TaskVectorsRecipe(Section):
    """The storage of task vectors while learning; the exported merge is exact in any case."""

    dtype: Literal["float32", "bfloat16", "float16", "int8", "int4"] | None = None
    """Dtype of the task vectors; by default that of the weights. int8 rounds by a step for each row
    of a matrix, int4 by a step for 64 entries of a row, and half a step is the largest error; LoRA
    factors then stay float32."""
    memory: Literal["device", "host", "disk", "auto"] = "device"
    """Place of the task vectors: device; host, the host's memory, from which the compiled step
    fetches one expert's piece of one layer at a time; or disk, a temporary file (under TMPDIR) that
    it reads. With host and disk, memory on the device does not grow with the number of experts.
    LoRA factors stay on the device. auto: the first of these with which the run fits."""


class ObjectiveRecipe(Section):
    """A term of the function that is minimised."""

    name: str
    """Name of the objective: entropy, logit_alignment, hidden_state_alignment, cross_entropy,
    pseudo_labels, expert_labels, of experts that give numbers output_alignment or squared_error, of
    sentence embedders embedding_alignment or contrastive, or package.module:function."""
    weight: Weight | dict[str, Weight] = 1.0
    """Factor of the objective in the sum, for all tasks or by task; a task that is not named has
    none. With a factor below 0 the objective is maximised: the task is to be forgotten."""
    options: dict[str, Any] = {}
    """Arguments of the objective, e.g. temperature of logit_alignment."""

    def weight_of(self, task: str) -> float:
        """Returns the objective's factor for one task."""
        return self.weight.get(task, 0.0) if isinstance(self.weight, dict) else self.weight


class RegularizerRecipe(Section):
    """A penalty on the coefficients that is added to the objectives."""

    name: str
    """Name of the regularizer: distance, lp_norm, expert_entropy, or package.module:function."""
    weight: Weight = 1.0
    """Factor of the regularizer in the sum."""
    options: dict[str, Any] = {}
    """Arguments of the regularizer, e.g. p of distance."""


class OptimizerRecipe(Section):
    """The optimizer, its learning rate and its schedule."""

    name: str = "adam"
    """An optax optimizer, e.g. adam, adamw, sgd; or frank_wolfe, for the constraints simplex and
    simplex_with_base, or concrete, for the constraint concrete."""
    learning_rate: Number = Field(default=1e-3, gt=0)
    """Step size; with a schedule, that of the first step."""
    schedule: str | None = None
    """An optax schedule, e.g. cosine_decay_schedule, or cosine_warm_restarts, or harmonic for
    frank_wolfe; by default the learning rate is constant."""
    schedule_options: dict[str, Any] = {}
    """Arguments of the schedule; decay_steps is by default the number of steps."""
    options: dict[str, Any] = {}
    """Further arguments of the optimizer, e.g. b1."""
    clip_norm: Number | None = Field(default=None, gt=0)
    """Largest norm of the gradient."""


class LearningRecipe(Section):
    """The number of steps, the batches and the held-out data."""

    steps: Count = 500
    """Number of optimizer steps."""
    batch_size: PickedCount = 16
    """Examples of every task per step. auto: the default, or half as many and so on where nothing
    else makes the run fit."""
    microbatches: PickedCount = 1
    """Equal parts in which a step runs its batch, one after the other: less memory for activations,
    the same coefficients. auto: as many as make the run fit."""
    mix: Literal["step", "part"] = "step"
    """The mixing of weights where there are several microbatches: once a step, which reads the
    task vectors twice and holds the merged model and its gradient; or in every part, layer by
    layer, which holds neither. LoRA factors are used in every part, and so are parameters that are
    split among devices."""
    examples: Whole | None = Field(default=None, ge=2, le=10**9)
    """Largest number of calibration examples of each task, drawn with the recipe's seed."""
    copies: Whole = Field(default=0, ge=0, le=1000)
    """Changed copies of each calibration example that are learned from beside it, with the expert's
    logits on them: images slightly turned, scaled and shifted, texts with up to 30% of their tokens
    hidden. Language models have none, and where examples are many there are fewer: as many as all
    steps draw."""
    held_out: Number = Field(default=0.2, gt=0, lt=1)
    """Part of the calibration data that is held out to choose the best coefficients."""
    evaluate_every: Count | None = None
    """Steps between evaluations of the held-out part; by default a tenth of all steps."""
    control: Number | None = Field(default=None, gt=0, le=1)
    """For objectives with a weight below 0: learning stops before the agreement of one of the other
    tasks on the held-out part falls below this fraction of its initial value. The agreement is with
    the labels, or where there are none with the expert."""
    optimizer: OptimizerRecipe = OptimizerRecipe()
    rematerialize: Literal["nothing", "weights", "elementwise", "layer", "auto"] = "elementwise"
    """Values that the backward pass computes again rather than keeps, from fastest to smallest.
    auto: elementwise, or layer where the run fits with that."""


class LmEvalRecipe(Section):
    """The evaluation of checkpoints by EleutherAI's lm-evaluation-harness."""

    @model_validator(mode="before")
    @classmethod
    def _from_tasks(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"found {value!r:.80}, expected a list of tasks, such as [arc_easy]")
        return {"tasks": value} if isinstance(value, list) else value

    tasks: list[str] = Field(min_length=1)
    """Tasks, groups and tags of the harness, such as arc_easy and mmlu."""
    models: Literal["all", "merge"] = "all"
    """Models that are evaluated. all: base, each expert and the merge. merge: the merge alone. A
    search looks at its merges alone."""
    limit: Count | None = None
    """Largest number of examples of each task, its first ones; by default all."""
    num_fewshot: Whole | None = Field(default=None, ge=0, le=1000)
    """Number of solved examples in a prompt; by default that of the task."""
    batch_size: Count = 8
    """Prompts that a model runs at once."""
    chat_template: bool = False
    """Write prompts as conversations in the merge's chat template, for chat models."""
    include_path: PathText | None = None
    """Folder with tasks of your own, YAML files of the harness, which may run code: needs
    --allow-code."""

    @property
    def own_tasks(self) -> str | None:
        """The name by which the code of tasks of somebody's own is allowed; None without any."""
        return None if self.include_path is None else f"lm_eval:{self.include_path}"


class EvaluationRecipe(Section):
    """The evaluation for the table of results."""

    batch_size: Count = 128
    """Examples per batch, at most; a processor runs 16 at a time, which is no slower there."""
    baselines: Literal["none", "quick", "all"] = "all"
    """Rows beside the merge. all: base, experts, average and task arithmetic; single models once
    more with heads fitted to them, where the merge's are. quick: experts and task arithmetic, which
    the outcome compares with. none: none but those of methods."""
    task_arithmetic: list[Weight] = Field(
        default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], min_length=1
    )
    """Coefficients among which task arithmetic chooses, where every task has validation data: every
    third is tried, then the neighbours of the best."""
    methods: list[MethodRecipe] = []
    """Merges without learning that have a row of their own in the table."""
    without_experts: bool = False
    """True to evaluate the merge once more for each expert, with that one's coefficients at 0: what
    each task loses without it. The report and `adamerge inspect` show it."""
    exact_match: bool | None = None
    """True if language models are to write answers to the prompts of the test data, which are
    compared with the responses; by default where the median response has at most 16 tokens."""
    max_new_tokens: Count = 64
    """Largest number of tokens of such an answer, which may be short of a response: that is then
    wrong."""
    lm_eval: Annotated[LmEvalRecipe | None, SWITCHED_OFF] = None
    """Tasks of lm-evaluation-harness, such as [arc_easy, hellaswag], on which the exported
    checkpoint, the base and the experts are evaluated: their names, or these with options. Needs
    the extra lm-eval."""


AUTOMATIC_FIELDS = (
    "learning.batch_size",
    "learning.microbatches",
    "learning.rematerialize",
    "task_vectors.memory",
)
"""The fields that may be `auto`, which is what they are on an accelerator where nothing is said."""

PICKED_WITH_THEM = ("learning.mix", "evaluation.batch_size")
"""Fields that are picked with these where a recipe leaves them out: no result depends on them."""

SHORTHANDS: Mapping[type[Section], str] = {
    _PathSection: "path",
    HeadsRecipe: "kind",
    LmEvalRecipe: "tasks",
}
"""The sections that may be written as one field of theirs alone, and that field."""

ScoreName = Literal["accuracy", "loss", "exact_match", "spearman", "recall"]
"""A score on validation data."""

Bounds = tuple[Number, Number]
"""The smallest and the largest coefficient."""


class SearchRecipe(Section):
    """The search for coefficients by a score, without gradients: `adamerge search`."""

    score: ScoreName | None = None
    """Score of a merge on the validation data, the mean over tasks: accuracy, loss (nats), or of
    language models exact_match, whose prompts and responses are those of the table; of sentence
    embedders spearman of scored pairs, or recall at 1 of others. By default accuracy, of language
    models loss, and of sentence embedders what their pairs have."""
    tasks: list[str] | None = Field(default=None, min_length=1)
    """Tasks whose scores count; by default all that have the score."""
    lm_eval: Annotated[LmEvalRecipe | None, SWITCHED_OFF] = None
    """Tasks of lm-evaluation-harness whose first metric is the score in place of validation data,
    the mean over them: their names, or these with options."""
    maximise: bool = True
    """True where more is better of the number that --score-command prints."""
    evaluations: Count = 200
    """Number of merges that are scored, the single coefficients of evaluation.task_arithmetic
    among them, which come first."""
    layer_groups: Count = 1
    """Number of groups of neighbouring layers with coefficients of their own; 1 for one coefficient
    of each expert."""
    sigma: Number = Field(default=0.2, gt=0)
    """Standard deviation of the first coefficients around the best single one."""
    bounds: Bounds = (0.0, 1.5)
    """Smallest and largest coefficient."""
    population: Whole | None = Field(default=None, ge=4, le=10**6)
    """Number of merges of a generation; by default 4 + 3 ln(number of coefficients)."""


class FrontRecipe(Section):
    """The front of what one task costs another: `adamerge front`."""

    score: ScoreName | None = None
    """Score of each task on its validation data: accuracy, loss (nats), of language models
    exact_match, or of sentence embedders spearman or recall. By default accuracy, of language
    models loss, and of sentence embedders what their pairs have."""
    samples: Count | None = None
    """Number of merges that the surfaces are fitted to; by default four times as many as a
    quadratic surface of the experts' coefficients has numbers."""
    points: Count = 12
    """Number of points of the front."""
    bounds: Bounds = (0.0, 1.0)
    """Smallest and largest coefficient."""


class ExportRecipe(Section):
    """The files in which the merge is written."""

    dtype: Dtype | None = None
    """Dtype of the weights; by default each tensor's in the base."""
    shard_megabytes: Count = 5000
    """Largest size of one safetensors file."""
    orbax: bool = True
    """Write the merged parameters as an Orbax checkpoint for JAX too, which is as large again."""
    adapter: bool = False
    """Write the merge as one LoRA adapter of the base too, whose rank is the sum of the experts';
    exact where coefficients are per tensor or coarser, row, column or head, and every expert is an
    adapter."""


class DevicesRecipe(Section):
    """The devices and processes that a run uses."""

    model: Count = 1
    """Number of devices among which every parameter and task vector is split; must divide the
    number of all devices. Examples are split among all of them in any case."""
    distributed: bool = False
    """Run as one of several processes, each started with this command, on one or several hosts. JAX
    detects Slurm, Kubernetes, Open MPI and TPU pods; elsewhere, give the next three."""
    coordinator: str | None = None
    """Address of the first process, host:port."""
    processes: Count | None = None
    """Number of processes."""
    process: Whole | None = Field(default=None, ge=0, le=10**9)
    """Index of this process, from 0."""


class Recipe(Section):
    """A merge: base, experts, data, coefficients, objective, optimizer, export.

    `load_recipe` and `parse_recipe` make it: they fill in the fields of the preset and report
    mistakes in one line. Its fields are those of the YAML file.

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
    """Preset that fills in the fields that the recipe leaves out: recommended, adamerging-task,
    adamerging, adamerging++, atlas, atlas-k, expert-merging, expert-merging++,
    self-positioning, adarank, fw-merging, concrete or
    symerge."""
    base: ModelSource
    """The model that all experts were fine-tuned from."""
    tasks: dict[str, TaskRecipe] = Field(min_length=1)
    """Tasks by name."""
    tokenizer: str | None = None
    """Model whose tokenizer, chat template and generation settings the merge takes: base, or a
    task, with the rows of tokens that its expert added to the base's. By default the first model
    that has a tokenizer; then all must have its special tokens."""
    keep_from_base: list[str] = []
    """Name patterns of parameters that stay the base's and are not merged."""
    retain: Annotated[RetainRecipe | None, SWITCHED_OFF] = RetainRecipe()
    """General text on which the base is the teacher; none to learn without."""
    interference: list[InterferenceRecipe] = []
    """Steps that change task vectors before mixing, in their order."""
    task_vectors: TaskVectorsRecipe = TaskVectorsRecipe()
    coefficients: CoefficientsRecipe = CoefficientsRecipe()
    heads: HeadsRecipe = HeadsRecipe()
    """Heads of classifiers: kept, scaled, refitted or learned, or these with options."""
    objectives: list[ObjectiveRecipe] = Field(min_length=1)
    """Terms of the function that is minimised."""
    regularizers: list[RegularizerRecipe] = []
    """Penalties on the coefficients that are added to the objectives."""
    learning: LearningRecipe = LearningRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    search: SearchRecipe = SearchRecipe()
    front: FrontRecipe = FrontRecipe()
    export: ExportRecipe = ExportRecipe()
    devices: DevicesRecipe = DevicesRecipe()
    tracking: list[Literal["tensorboard", "wandb"]] = []
    """Trackers that get the numbers of every step beside metrics.jsonl: tensorboard, wandb."""
    max_length: Whole = Field(default=128, ge=2, le=10**9)
    """Longest text in tokens; longer ones are cut, and the run says how many."""
    image_size: Side | tuple[Side, Side] | None = None
    """Height and width in pixels, or one number for both, to which images in conversations are
    resized before the model's processor reads them; by default they are not."""
    dtype: Dtype | None = None
    """Dtype of weights and activations while learning; by default the checkpoint's."""
    seed: Whole = Field(default=0, ge=0, lt=2**32)
    """Seed of all randomness."""

    _left_open: dict[str, bool] = PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Returns True for a recipe of the same values, wherever they come from."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    @property
    def left_open(self) -> Mapping[str, bool]:
        """The fields that a run may pick: True where the recipe says auto, else it says nothing."""
        return self._left_open

    @property
    def own_code(self) -> dict[str, str]:
        """The code of somebody's own by the field that names it: `package.module:function`."""
        lists: dict[str, Sequence[Any]] = {
            "interference": self.interference,
            "objectives": self.objectives,
            "regularizers": self.regularizers,
            "evaluation.methods": self.evaluation.methods,
        }
        names = {"coefficients.granularity": self.coefficients.granularity} | {
            f"{field}.{position}.name": choice.name
            for field, choices in lists.items()
            for position, choice in enumerate(choices)
        }
        if self.coefficients.initial_merge is not None:
            names["coefficients.initial_merge.name"] = self.coefficients.initial_merge.name
        for section, fields in (("evaluation", self.evaluation), ("search", self.search)):
            if fields.lm_eval is not None:
                names[f"{section}.lm_eval.include_path"] = fields.lm_eval.own_tasks or ""
        return {field: name for field, name in names.items() if is_own_code(name)}

    @property
    def initial_coefficient(self) -> float:
        """The value at which every coefficient starts; where it is chosen, the first candidate."""
        if isinstance(self.coefficients.initial, float):
            return self.coefficients.initial
        if self.coefficients.initial_merge is not None:
            return 0.0
        models = {
            "softmax": len(self.tasks),
            "simplex": len(self.tasks),
            "simplex_with_base": len(self.tasks) + 1,
            "positions": len(self.tasks) + 1,
        }
        averaged = models.get(self.coefficients.constraint)
        return 0.3 if averaged is None else 1 / averaged

    @property
    def chooses_initial(self) -> bool:
        """True if the initial value is the one whose merge has the lowest objective."""
        coefficients = self.coefficients
        return (
            coefficients.initial == "auto"
            and coefficients.constraint in ("free", "clip")
            and coefficients.initial_merge is None
            and not self.forgotten
        )

    @property
    def own_keep_from_base(self) -> list[str]:
        """The patterns that must fit a parameter: all but the preset's, which is for any model."""
        return [pattern for pattern in self.keep_from_base if pattern not in self._kept_by_preset]

    @property
    def heads_of_preset(self) -> HeadsRecipe:
        """The heads that the preset chooses, where the models have some."""
        return HeadsRecipe.model_validate(PRESETS[self.preset].get("heads", {}))

    @property
    def to_fold(self) -> "Recipe":
        """The recipe for folding a coefficients file, which names the merged tensors itself.

        The preset's `keep_from_base` is left out, because the file may have been learned with
        another preset; the user's own `keep_from_base` stays.
        """
        if self.keep_from_base != self._kept_by_preset:
            return self
        return self.model_copy(update={"keep_from_base": []})

    @property
    def _kept_by_preset(self) -> list[str]:
        return PRESETS[self.preset].get("keep_from_base", [])

    @property
    def calibration_sources(self) -> list[DataSource]:
        """The calibration data of all tasks."""
        sources = (fields.calibration for fields in self.tasks.values())
        return [source for source in sources if source is not None]

    def require_calibration(self) -> None:
        """Refuses a recipe that lacks data to learn from.

        Raises:
            InputError: Names the tasks that lack it.
        """
        lacking = [task for task, fields in self.tasks.items() if fields.calibration is None]
        if lacking:
            fields = "; ".join(f"field tasks.{task}.calibration is missing" for task in lacking)
            raise InputError(f"{fields}; only merges without learning need no data")

    @property
    def forgotten(self) -> list[str]:
        """The tasks with an objective of negative weight."""
        return [t for t in self.tasks if any(term.weight_of(t) < 0 for term in self.objectives)]
