"""The outline of a merge as abstract arrays: shapes and dtypes of all that learning holds."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from adamerge_jax.checkpoints.dtypes import DTYPES, FLOAT32
from adamerge_jax.coefficients.granularities import (
    Granularity,
    Shapes,
    Values,
    constant,
)
from adamerge_jax.coefficients.importance import expected_granularity
from adamerge_jax.data.batches import BATCHES_SORTED_TOGETHER, Batch
from adamerge_jax.data.examples import Examples
from adamerge_jax.data.expert_targets import expert_targets
from adamerge_jax.data.locations import is_on_hub
from adamerge_jax.data.packing import BATCHES_TRIED, Packing, packing_for
from adamerge_jax.evaluation.retention import RETAINED
from adamerge_jax.learning.learner import Frozen, Learner, State
from adamerge_jax.models.family import Network, complete_head
from adamerge_jax.models.images_in_text import COUNT, PIXELS, ImagesInText
from adamerge_jax.models.layers import Outputs
from adamerge_jax.models.problem import CLASSES, NUMBERS, WORDS
from adamerge_jax.models.token_rows import PLACES, SLOTS
from adamerge_jax.objectives import CrossTaskTargets, Targets, TargetSpec
from adamerge_jax.pipeline.example_loader import ExampleLoader, example_loader, image_shape
from adamerge_jax.pipeline.general import find_general
from adamerge_jax.pipeline.learn import learner_of, may_pack, require_any_merged
from adamerge_jax.pipeline.models import Models, open_models
from adamerge_jax.pipeline.read import load_expert, load_task_vectors
from adamerge_jax.pipeline.workspace import forward_for
from adamerge_jax.plan.data_sizes import DataSize, data_sizes, shapes_of_images
from adamerge_jax.plan.work import bytes_of
from adamerge_jax.recipes.build import GranularityChoice, Method, build
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.recipes.schema import DataSource, Recipe
from adamerge_jax.stacks import Stacked
from adamerge_jax.task_vectors import (
    Delta,
    DenseDelta,
    JoinedDelta,
    QuantizedDelta,
)
from adamerge_jax.task_vectors.offload.memory import AbstractMemory

Abstract = jax.ShapeDtypeStruct

ASSUMED_CLASSES = 100
"""The number of classes of a zero-shot head whose class names only the data set has."""


R = TypeVar("R")


def _remembered(method: Callable[..., R]) -> Callable[..., R]:
    """Returns a method of an outline that traces a model once for the same arguments."""

    @functools.wraps(method)
    def call(outline: "Outline", *arguments: Any) -> R:
        memory = outline.__dict__.setdefault("_memory", {})
        key = (method.__name__, arguments)
        if key not in memory:
            memory[key] = method(outline, *arguments)
        return memory[key]

    return call


_OF_MODELS = ("_memory", "base", "heads", "head_parameters")

_UNCHANGED_BY = {
    **dict.fromkeys(
        (
            "learning.rematerialize",
            "learning.microbatches",
            "learning.mix",
            "learning.batch_size",
            "evaluation.batch_size",
        ),
        (*_OF_MODELS, "task_vectors"),
    ),
    "task_vectors.dtype": _OF_MODELS,
    "task_vectors.memory": _OF_MODELS,
}
"""The attributes of an outline that stay the same when a field changes, by the field."""


@dataclasses.dataclass(frozen=True)
class Outline:
    """A merge without its weights.

    Attributes:
        recipe: The recipe.
        models: The base and its experts, opened; no weight is read.
        data: The sizes of the data by part (`calibration`, `validation`, `test`) and task.
    """

    recipe: Recipe
    models: Models
    data: Mapping[str, Mapping[str, DataSize]]

    def changed(self, field: str, value: Any) -> "Outline":
        """Returns the outline with one field of the recipe changed.

        Raises:
            InputError: The other fields do not go with the new value.
        """
        fields = self.recipe.model_dump()
        section, _, name = field.rpartition(".")
        (fields[section] if section else fields)[name] = value
        recipe = parse_recipe(fields)
        shortened = {
            part: {task: size.cut(recipe.max_length) for task, size in sizes.items()}
            for part, sizes in self.data.items()
        }
        changed = Outline(recipe, self.models, shortened)
        # What is known already need not be traced anew.
        for name in _UNCHANGED_BY.get(field, ()):
            if name in self.__dict__:
                changed.__dict__[name] = self.__dict__[name]
        return changed

    @functools.cached_property
    def method(self) -> Method:
        """The method that the recipe describes."""
        method = build(self.recipe, self.models)
        if RETAINED in self.data["calibration"] and method.retained is not None:
            method = method.with_task(RETAINED, method.retained)
        return method

    @functools.cached_property
    def backbone(self) -> Network:
        """The merged part of the model, as a function of its parameters."""
        rematerialize = self.recipe.learning.rematerialize
        return self.models.family.build_backbone(self.models.config, rematerialize)

    @functools.cached_property
    def heads(self) -> Mapping[str, Network]:
        """Each task's head as a function of its parameters."""
        heads = {task: self.models.build_head(task) for task in self.models.experts}
        if RETAINED in self.data["calibration"]:
            heads[RETAINED] = self.models.family.build_head(self.models.config)
        return heads

    @functools.cached_property
    def head_parameters(self) -> Mapping[str, Mapping[str, Abstract]]:
        """The abstract parameters of each head."""
        names = {task: fields.class_names for task, fields in self.recipe.tasks.items()}
        return {
            task: _head_parameters(self.models, head, task, names[task], self.dtype)
            if task in names
            else {}  # general text's is all of the backbone
            for task, head in self.heads.items()
        }

    @functools.cached_property
    def base(self) -> dict[str, Abstract]:
        """The abstract parameters of the base."""
        models = self.models
        return {
            name: Abstract(shape, self.dtype or models.base.dtype(models.tensors(name)[0]))
            for name, shape in models.shapes.items()
        }

    @functools.cached_property
    def task_vectors(self) -> tuple[dict[str, Delta], list[str]]:
        """The abstract task vectors as they are loaded, and the names of the mixed tensors.

        All parameters that may differ from the base are taken to differ: no weight is read.
        """
        method = self.method
        deltas, mixed, _ = load_task_vectors(
            self.models, method.delta_dtype, method.interference, AbstractMemory()
        )
        return deltas, mixed

    @property
    def deltas(self) -> dict[str, Delta]:
        """The abstract task vectors as they are loaded."""
        return self.task_vectors[0]

    @property
    def target_specs(self) -> Mapping[str, TargetSpec]:
        """The targets that the objective of each task wants."""
        return self.method.target_specs

    @property
    def experts(self) -> int:
        """The number of experts, K."""
        return len(self.models.experts)

    @property
    def dtype(self) -> np.dtype | None:
        """The dtype of weights and activations; None for the checkpoint's."""
        return DTYPES[self.recipe.dtype] if self.recipe.dtype else None

    @property
    def shapes(self) -> Shapes:
        """The shapes of the mixed parameters, `(L, *shape)` where stacked."""
        return {name: self.models.shapes[name] for name in self.deltas}

    @property
    def longest(self) -> int:
        """The number of tokens of the longest calibration example; 0 for images."""
        return max(int(size.lengths.max()) for size in self.data["calibration"].values())

    def inputs(self, examples: int, length: int) -> dict[str, Abstract]:
        """Returns the model inputs of some examples of `length` tokens."""
        names = self.models.family.inputs
        if self.models.family.images is not None:
            return self._conversations(self.models.family.images, examples, length)
        if names[0] == PIXELS:
            return {PIXELS: Abstract((examples, *image_shape(self.models)), np.float32)}
        sources = self.recipe.calibration_sources
        are_pairs = any(not isinstance(source.text, str) for source in sources)
        texts: tuple[int, ...] = ()
        if self.models.family.embeds is not None and are_pairs:
            texts = (2,)
        elif self.models.family.reads_choices:
            texts = (max(size.choices for size in self.data["calibration"].values()),)
        return {name: Abstract((examples, *texts, length), np.int32) for name in names}

    def _conversations(
        self, images: ImagesInText, examples: int, length: int
    ) -> dict[str, Abstract]:
        """Returns the model inputs of conversations with images, all with places for the most."""
        shapes: dict[str, tuple[int, ...]] = {
            name: (length,) for name in self.models.family.inputs if name != PIXELS
        }
        shapes[COUNT] = ()
        text = [images.token + 1]
        if images.positions(text, None) is not None:
            shapes["position_ids"] = (3, length)
        inputs = {name: Abstract((examples, *shape), np.int32) for name, shape in shapes.items()}
        if given := [size.images for size in self.data["calibration"].values() if size.images]:
            most = max(shapes[PIXELS][0] for shapes in given)
            of_images = given[0] | {PIXELS: (most, *given[0][PIXELS][1:])}
            for name, shape in of_images.items():
                inputs[name] = Abstract((examples, *shape), np.float32)
        return inputs

    @_remembered
    def outputs(self, examples: int, length: int) -> Outputs:
        """Returns the backbone's abstract outputs for some examples, with all hidden states."""
        run = partial(self.backbone, hidden_states=True)
        return jax.eval_shape(run, self.base, self.inputs(examples, length))

    @_remembered
    def logits(self, task: str, examples: int, length: int) -> Abstract:
        """Returns the abstract logits of a task's head, `[B, C]` or `[B, T, V]`."""
        head, parameters = self.heads[task], self.head_parameters[task]
        for other in self.heads:
            if other == task:
                break
            # A language model has one head for all tasks.
            if self.heads[other] is head and self.head_parameters[other] == parameters:
                return self.logits(other, examples, length)
        head_parameters = complete_head(head, parameters, self.base)
        return jax.eval_shape(head, head_parameters, self.outputs(examples, length))

    @_remembered
    def targets(self, task: str, examples: int, length: int) -> Targets:
        """Returns the abstract targets of some examples of a task."""
        spec = self.target_specs[task]
        logits = self.logits(task, examples, length)

        def compute_targets(logits: Any, hidden_states: Any) -> Targets:
            states = {layer: hidden_states[layer] for layer in spec.hidden_states}
            return expert_targets(spec, logits, states)

        hidden_states = self.outputs(examples, length).hidden_states
        targets = jax.eval_shape(compute_targets, logits, hidden_states)
        positions = logits.shape[:-1]
        if self.models.family.embeds is not None:
            return targets
        problem = self.models.problems.get(task)
        if problem == WORDS:
            targets = targets._replace(counted=Abstract(positions, bool))
        if spec.expert_spread:
            targets = targets._replace(expert_spread=Abstract(logits.shape, np.float32))
        source = self.recipe.tasks[task].calibration if task in self.recipe.tasks else None
        if self.models.family.language or (source is not None and source.label is not None):
            labels = Abstract(positions, np.int32)
            if problem == NUMBERS:
                labels = Abstract(logits.shape, np.float32)
            targets = targets._replace(labels=labels)
        if spec.cross_task:
            others = (examples, len(self.recipe.tasks) - 1)
            cross_task_logits = Abstract((*others, logits.shape[-1]), logits.dtype)
            weights = Abstract(others, np.float32)
            targets = targets._replace(cross_task=CrossTaskTargets(cross_task_logits, weights))
        if spec.prompts:
            targets = targets._replace(prompts=Abstract(positions, bool))
        return targets

    @functools.cached_property
    def packing(self) -> Packing | None:
        """The rows that the texts of a step are packed in; None for a row each."""
        sizes, size = self.data["calibration"].values(), self.recipe.learning.batch_size
        counts = [of_task.tokens for of_task in sizes if of_task.tokens is not None]
        if not may_pack(self.method, self.models) or len(counts) < len(sizes):
            return None
        generator = np.random.default_rng(self.recipe.seed)
        lengths = [
            np.concatenate([generator.choice(of_task, size) for of_task in counts])
            for _ in range(BATCHES_TRIED)
        ]
        padded_tokens = BATCHES_TRIED * len(sizes) * size * self.average_length
        return packing_for(lengths, self.longest, padded_tokens)

    @property
    def average_length(self) -> float:
        """The mean length of batches, each padded to the longest of its similar examples."""
        quantiles = (np.arange(BATCHES_SORTED_TOGETHER) + 1) / BATCHES_SORTED_TOGETHER
        sizes = self.data["calibration"].values()
        longest = [np.quantile(size.lengths, quantiles, method="higher") for size in sizes]
        return float(np.max(longest, axis=0).mean())

    def batch(self, length: int) -> Batch:
        """Returns the batch of one step, of examples of `length` tokens."""
        tasks, size = list(self.data["calibration"]), self.recipe.learning.batch_size
        inputs = self.inputs(len(tasks) * size, length)
        if self.packing is not None:
            inputs[SLOTS] = Abstract((self.packing.rows, length), np.int32)
            inputs[PLACES] = Abstract((len(tasks) * size, length), np.int32)
        return Batch(
            inputs,
            Abstract((len(tasks), size), np.float32),
            Stacked.of([self.targets(task, size, length) for task in tasks]),
            inputs if any(spec.augmented for spec in self.target_specs.values()) else None,
        )

    def expert(self, task: str) -> dict[str, Any]:
        """Returns an expert's parameters: arrays, or for an adapter the base's with factors."""
        return load_expert(self.models, task, self.base, self.dtype, AbstractMemory())

    def learning(self) -> "AbstractLearning":
        """Returns the abstract arguments of the learning loop."""
        stage = self.method.result
        choice = expected_granularity(*stage.granularity, self.experts, len(self.task_vectors[1]))
        stage = stage._replace(granularity=GranularityChoice(*choice))
        granularity = stage.granularity.make(self.shapes)
        deltas = {
            parameter: granularity.prepare(parameter, delta)
            for parameter, delta in self.deltas.items()
        }
        specs = self.method.target_specs.values()
        forward = forward_for(specs, self.models.family, self.backbone, self.heads)
        learner = learner_of(self.method, stage, forward, self.models.devices, granularity)
        start = partial(constant, self.shapes, self.experts, self.recipe.initial_coefficient)
        values = jax.eval_shape(lambda: granularity.init(start()))
        heads = Stacked.of(list(self.head_parameters.values()))
        state = jax.eval_shape(lambda heads: learner.init(granularity.init(start()), heads), heads)
        frozen = Frozen(self.base, deltas, heads)
        return AbstractLearning(granularity, learner, state, frozen, values)


def streamed_bytes(delta: Delta) -> int:
    """Returns the bytes of a delta's entries, which can be outside of the device."""
    if isinstance(delta, JoinedDelta):
        return sum(map(streamed_bytes, delta.parts))
    return bytes_of(delta) if isinstance(delta, DenseDelta | QuantizedDelta) else 0


class AbstractLearning(NamedTuple):
    """The learning loop without arrays.

    Attributes:
        granularity: The granularity of the coefficients.
        learner: The functions of the loop.
        state: The abstract state of learning.
        frozen: The abstract parameters that are not learned.
        values: The abstract coefficients by group, `[G, K, ...]`.
    """

    granularity: Granularity
    learner: Learner
    state: State
    frozen: Frozen
    values: Values


def outline(recipe: Recipe, root: Path) -> Outline:
    """Outlines a recipe's merge: opens its models and measures its data; reads no weight.

    Args:
        recipe: The recipe.
        root: Folder that relative paths start from.

    Raises:
        InputError: A checkpoint or a file is missing, damaged or of another architecture, or
            nothing is merged.
    """
    recipe.require_calibration()
    models = open_models(recipe, root, read_weights=False)

    # NumPy files and data on the Hub need no tokenizer.
    @functools.cache
    def loader() -> ExampleLoader:
        return example_loader(
            models,
            root,
            tokenizer=recipe.tokenizer,
            max_length=recipe.max_length,
            seed=recipe.seed,
            image_size=recipe.image_size,
        )

    chats = []

    def load(source: DataSource, name: str, task: str) -> Examples:
        expert = models.experts.get(task)  # general text is no task
        outputs = 0 if expert is None else expert.checkpoint.config.num_labels
        examples = loader()(source, name, models.problems.get(task, CLASSES), outputs)
        chats.append(examples.are_conversations)
        return examples

    data = {}
    for part in ("calibration", "validation", "test"):
        sources = {task: fields.source(part) for task, fields in recipe.tasks.items()}
        sources = {task: source for task, source in sources.items() if source is not None}
        data[part] = data_sizes(sources, part, models, root, recipe.max_length, load)
    data["calibration"] = {
        task: size.limited(recipe.learning.examples) for task, size in data["calibration"].items()
    }
    retain = recipe.retain
    # Classifiers need no loader, which looks for a tokenizer.
    if models.family.language and retain is not None and retain.weight:
        if retain.path is not None and is_on_hub(retain, root):
            sizes = data_sizes({RETAINED: retain}, "general", models, root, recipe.max_length, load)
            data["calibration"] |= sizes
        elif found := find_general(
            retain, recipe.learning, loader(), is_chat=any(chats), seed=recipe.seed
        ):
            images = shapes_of_images(found.text) if isinstance(found.text, Examples) else {}
            data["calibration"][RETAINED] = DataSize(found.padded_lengths(), images=images)
    opened = Outline(recipe, models, data)
    require_any_merged(opened.deltas)
    return opened


def _head_parameters(
    models: Models,
    head: Network,
    task: str,
    class_names: Sequence[str] | None,
    dtype: np.dtype | None,
) -> dict[str, Abstract]:
    """Returns the abstract parameters of a task's head."""
    if models.family.auto_class is None:
        shapes = {name: leaf.shape for name, leaf in head.shapes.items()}
        classes = len(class_names or ()) or ASSUMED_CLASSES
        shapes["text_embeddings"] = (classes, shapes["text_embeddings"][1])
        return {name: Abstract(shape, dtype or FLOAT32) for name, shape in shapes.items()}
    stored = {name: models.experts[task].tensor(name) for name in models.head_names(task)}
    return {name: Abstract(info.shape, dtype or info.dtype) for name, info in stored.items()}
