"""A recipe's merge as abstract arrays: shapes and dtypes of all that learning would hold."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from adamerge_jax.checkpoints.dtypes import DELTA_DTYPES, DTYPES, FLOAT32, INT8
from adamerge_jax.checkpoints.peft import Expert
from adamerge_jax.coefficients.granularities import (
    Granularity,
    Shapes,
    Values,
    constant,
    make_granularity,
)
from adamerge_jax.coefficients.importance import expected_granularity
from adamerge_jax.data.batches import Batch
from adamerge_jax.learning.learner import Frozen, Learner, State
from adamerge_jax.mixing import mix
from adamerge_jax.models.family import Network, complete_head
from adamerge_jax.models.inputs import ImageGeometry
from adamerge_jax.models.layers import Outputs
from adamerge_jax.objectives import Needs, Targets, TopTokens
from adamerge_jax.parameter_names import is_stacked, tensor_shape
from adamerge_jax.pipeline.learn import learner_of, require_any_merged
from adamerge_jax.pipeline.models import Models, open_models
from adamerge_jax.plan.data_sizes import DataSize, data_sizes
from adamerge_jax.plan.work import bytes_of
from adamerge_jax.recipes.build import GranularityChoice, Method, build
from adamerge_jax.recipes.schema import Recipe
from adamerge_jax.task_vectors import (
    Delta,
    DenseDelta,
    JoinedDelta,
    LowRankDelta,
    QuantizedDelta,
)

Abstract = jax.ShapeDtypeStruct

ASSUMED_CLASSES = 100
"""Of a zero-shot head whose class names only the data set has."""


class Outline(NamedTuple):
    """A merge without its weights.

    Attributes:
        recipe: Says what to merge.
        method: How coefficients are learned.
        models: Opened, no weight read.
        data: Sizes of the data by part (`calibration`, `validation`, `test`) and task.
        backbone: What is merged, as a function of its parameters.
        heads: Each task's head as a function of its parameters.
        head_parameters: Abstract parameters of each head.
        base: Abstract parameters of the base.
        deltas: Abstract task vectors as they are loaded.
        needs: What the objective of each task must be given.
    """

    recipe: Recipe
    method: Method
    models: Models
    data: Mapping[str, Mapping[str, DataSize]]
    backbone: Network
    heads: Mapping[str, Network]
    head_parameters: Mapping[str, Mapping[str, Abstract]]
    base: dict[str, Abstract]
    deltas: dict[str, Delta]
    needs: Mapping[str, Needs]

    @property
    def experts(self) -> int:
        """K."""
        return len(self.models.experts)

    @property
    def shapes(self) -> Shapes:
        """Of the mixed parameters, `(L, *shape)` where stacked."""
        return {name: self.models.shapes[name] for name in self.deltas}

    @property
    def longest(self) -> int:
        """Tokens of the longest calibration example; 0 for images."""
        return max(int(size.lengths.max()) for size in self.data["calibration"].values())

    def inputs(self, examples: int, length: int) -> dict[str, Abstract]:
        """Model inputs of so many examples of `length` tokens."""
        names = self.models.family.inputs
        if names[0] == "pixel_values":
            config = self.models.config
            image = ImageGeometry.of(getattr(config, "vision_config", config))
            shape = (examples, image.channels, image.height, image.width)
            return {"pixel_values": Abstract(shape, np.float32)}
        return {name: Abstract((examples, length), np.int32) for name in names}

    def outputs(self, examples: int, length: int) -> Outputs:
        """What the backbone says of them, all hidden states included."""
        run = partial(self.backbone, hidden_states=True)
        return jax.eval_shape(run, self.base, self.inputs(examples, length))

    def logits(self, task: str, examples: int, length: int) -> Abstract:
        """What a task's head says of them, `[B, C]` or `[B, T, V]`."""
        head = self.heads[task]
        own = complete_head(head, self.head_parameters[task], self.base)
        return jax.eval_shape(head, own, self.outputs(examples, length))

    def targets(self, task: str, examples: int, length: int) -> Targets:
        """What examples of a task are compared with."""
        needs = self.needs[task]
        said = self.logits(task, examples, length)
        logits = top = elsewhere = weights = None
        positions = said.shape[:-1]
        if needs.expert_logits and len(positions) == 2 and needs.top_tokens is not None:
            shape = (*positions, min(needs.top_tokens, said.shape[-1]))
            top = TopTokens(Abstract(shape, np.int32), Abstract(shape, np.float32))
        elif needs.expert_logits:
            logits = said
        if needs.elsewhere:
            others = (len(self.recipe.tasks) - 1) * examples
            elsewhere = Abstract((others, said.shape[-1]), said.dtype)
            weights = Abstract((others,), np.float32)
        hidden = {}
        if needs.hidden_states:
            states = self.outputs(examples, length).hidden_states
            hidden = {
                layer: Abstract(states.shape[1:], states.dtype) for layer in needs.hidden_states
            }
        labels = None
        if len(positions) == 2 or self.recipe.tasks[task].calibration.label is not None:
            labels = Abstract(positions, np.int32)
        return Targets(logits, hidden, labels, elsewhere, weights, top)

    def batch(self, length: int) -> Batch:
        """One step's batch of examples of `length` tokens."""
        tasks, size = list(self.recipe.tasks), self.recipe.learning.batch_size
        inputs = self.inputs(len(tasks) * size, length)
        return Batch(
            inputs,
            Abstract((len(tasks), size), np.float32),
            [self.targets(task, size, length) for task in tasks],
            inputs if any(own.strong_view for own in self.needs.values()) else None,
        )

    def expert(self, task: str) -> dict[str, Any]:
        """Parameters of one expert: arrays, or for an adapter the base's with lazy factors."""
        expert = self.models.experts[task]
        if not getattr(expert, "factors", None):
            return self.base
        alone = dataclasses.replace(self.models, experts={task: expert}, kept=frozenset())
        deltas = _deltas(alone, _dtype(self.recipe), interference=False)
        shapes = {name: self.models.shapes[name] for name in deltas}
        whole = make_granularity("tensor", {}, shapes)
        start = partial(constant, shapes, 1, 1.0)
        scales = jax.eval_shape(lambda: whole.scales(whole.init(start())))
        return mix(self.base, deltas, scales)

    def learning(self) -> "AbstractLearning":
        """What the learning loop starts from."""
        stage = self.method.result
        choice = expected_granularity(*stage.granularity, self.experts, self.tensors_mixed)
        stage = stage._replace(granularity=GranularityChoice(*choice))
        granularity = stage.granularity.make(self.shapes)
        deltas = {
            parameter: granularity.prepare(parameter, delta)
            for parameter, delta in self.deltas.items()
        }
        learner = learner_of(
            self.method, stage, self.models, self.backbone, self.heads, granularity
        )
        start = partial(constant, self.shapes, self.experts, self.recipe.initial_coefficient)
        values = jax.eval_shape(lambda: granularity.init(start()))
        state = jax.eval_shape(lambda: learner.init(granularity.init(start())))
        frozen = Frozen(self.base, deltas, list(self.head_parameters.values()))
        return AbstractLearning(granularity, learner, state, frozen, values)

    @property
    def tensors_mixed(self) -> int:
        """Number of tensors that are mixed."""
        return sum(len(_open_tensors(self.models, name)) for name in self.deltas)


def streamed_bytes(delta: Delta) -> int:
    """What of a delta can be outside the device: its entries, not its factors."""
    if isinstance(delta, JoinedDelta):
        return sum(map(streamed_bytes, delta.parts))
    return bytes_of(delta) if isinstance(delta, DenseDelta | QuantizedDelta) else 0


class AbstractLearning(NamedTuple):
    """The learning loop without arrays.

    Attributes:
        granularity: Which parameters share a coefficient.
        learner: How they are learned.
        state: Abstract.
        frozen: Abstract.
        values: Abstract coefficients by group, `[G, K, ...]`.
    """

    granularity: Granularity
    learner: Learner
    state: State
    frozen: Frozen
    values: Values


def outline(recipe: Recipe, root: Path) -> Outline:
    """Opens a recipe's models and measures its data; reads no weight.

    Args:
        recipe: Says which.
        root: Folder that relative paths start from.

    Raises:
        InputError: A checkpoint or a file is missing, damaged or of another architecture, or
            nothing is merged.
    """
    models = open_models(recipe, root, read_weights=False)
    data = {
        part: data_sizes(recipe, models, root, part)
        for part in ("calibration", "validation", "test")
    }
    data["calibration"] = {
        task: size.limited(recipe.learning.examples) for task, size in data["calibration"].items()
    }
    return of_models(recipe, models, data)


def of_models(
    recipe: Recipe, models: Models, data: Mapping[str, Mapping[str, DataSize]]
) -> Outline:
    """The outline of a recipe whose models are open: another recipe of the same is quick.

    Raises:
        InputError: No expert brings a parameter that is merged.
    """
    dtype = _dtype(recipe)
    base = {
        name: Abstract(shape, dtype or models.base.dtype(models.tensors(name)[0]))
        for name, shape in models.shapes.items()
    }
    heads = {
        task: models.family.build_head(expert.checkpoint.config)
        for task, expert in models.experts.items()
    }
    kept = {task: _kept_by_task(recipe, models, heads[task], task) for task in heads}
    deltas = _deltas(models, _delta_dtype(recipe), interference=bool(recipe.interference))
    require_any_merged(deltas)
    method = build(recipe, models)
    return Outline(
        recipe,
        method,
        models,
        data,
        models.family.build_backbone(models.config, recipe.learning.rematerialize),
        heads,
        kept,
        base,
        deltas,
        method.target_specs,
    )


def _dtype(recipe: Recipe) -> np.dtype | None:
    return DTYPES[recipe.dtype] if recipe.dtype else None


def _delta_dtype(recipe: Recipe) -> np.dtype | None:
    chosen = recipe.task_vectors.dtype
    return DELTA_DTYPES[chosen] if chosen else _dtype(recipe)


def _kept_by_task(recipe: Recipe, models: Models, head: Network, task: str) -> dict[str, Abstract]:
    """Abstract parameters of a task's head."""
    dtype = _dtype(recipe)
    if models.family.auto_class is None:
        shapes = {name: leaf.shape for name, leaf in head.shapes.items()}
        classes = len(recipe.tasks[task].class_names or ()) or ASSUMED_CLASSES
        shapes["text_embeddings"] = (classes, shapes["text_embeddings"][1])
        return {name: Abstract(shape, dtype or FLOAT32) for name, shape in shapes.items()}
    expert = models.experts[task]
    saved = getattr(expert, "saved", None)
    names = saved if saved is not None else expert.names
    tensors = expert.checkpoint.tensors
    found = {name: tensors[names[name]] for name in models.head_names(task)}
    return {name: Abstract(info.shape, dtype or info.dtype) for name, info in found.items()}


def _open_tensors(models: Models, name: str) -> list[str]:
    """Tensors of a parameter that are merged."""
    return [
        tensor
        for tensor in models.tensors(name)
        if tensor not in models.kept
        and any(expert.changes(tensor) for expert in models.experts.values())
    ]


def _deltas(models: Models, dtype: np.dtype | None, *, interference: bool) -> dict[str, Delta]:
    """Abstract task vectors, in the representation that loading them gives.

    What no expert changed is known only from the weights: here all that may differ does.
    """
    deltas = {}
    for name in models.shapes:
        if tensors := _open_tensors(models, name):
            deltas[name] = _delta(models, name, tensors, dtype, interference)
    return deltas


def _delta(
    models: Models, name: str, tensors: list[str], dtype: np.dtype | None, interference: bool
) -> Delta:
    """The abstract task vectors of one parameter: the one place that says how they are stored."""
    experts = list(models.experts.values())
    shape = models.shapes[name]
    layers, own = shape[: is_stacked(name)], tensor_shape(name, shape)

    def dense(count: int) -> DenseDelta | QuantizedDelta:
        stored = dtype or models.base.dtype(models.tensors(name)[0])
        if stored == INT8:
            rows = (own[0],) + (1,) * (len(own) - 1) if len(own) > 1 else (1,)
            steps = Abstract((*layers, count, *rows), np.float32)
            return QuantizedDelta(Abstract((*layers, count, *own), INT8), steps)
        return DenseDelta(Abstract((*layers, count, *own), stored))

    low_rank = [k for k, each in enumerate(experts) if any(map(each.has_factors, tensors))]
    if interference or not low_rank:
        return dense(len(experts))
    rank = max(_rank(experts[k], tensor) for k in low_rank for tensor in tensors)
    height, width = own
    stored = FLOAT32 if dtype in (None, INT8) else dtype
    factors = LowRankDelta(
        Abstract((*layers, len(low_rank), height, rank), stored),
        Abstract((*layers, len(low_rank), rank, width), stored),
    )
    whole = [
        k
        for k, each in enumerate(experts)
        if any(each.changes(tensor) and not each.has_factors(tensor) for tensor in tensors)
    ]
    if not whole and len(low_rank) == len(experts):
        return factors
    parts = [(factors, tuple(low_rank)), *([(dense(len(whole)), tuple(whole))] if whole else [])]
    deltas, positions = zip(*parts, strict=True)
    return JoinedDelta(deltas, positions, len(experts))


def _rank(expert: Expert, tensor: str) -> int:
    """Of the factors that an adapter has for a tensor; 0 where it has none."""
    if not expert.has_factors(tensor):
        return 0
    return expert.checkpoint.tensors[expert.factors[tensor].a].shape[0]
