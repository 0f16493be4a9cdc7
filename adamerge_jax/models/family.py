"""A family of models: the backbone that is merged, and the head that each task keeps.

Both are `Network`s, pure functions of flat parameter dictionaries whose keys are the names in a
Hugging Face checkpoint (`*` where layers are stacked).
"""

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache, partial
from typing import NamedTuple

from flax import nnx
from jaxtyping import Array

from adamerge_jax.errors import InputError
from adamerge_jax.models.choices import ChoicesBackbone, ChoicesHead
from adamerge_jax.models.embedding_form import EmbeddingForm
from adamerge_jax.models.images_in_text import ImagesInText
from adamerge_jax.models.labels import LabelsHead
from adamerge_jax.models.layers import Config, Rematerialize
from adamerge_jax.models.network import Network as Network
from adamerge_jax.models.problem import CHOICES, CLASSES, LABELS, MULTIPLE_CHOICE, Problem

OUTPUT_LAYER = "lm_head.weight"
"""The usual name of a language model's output layer, where it is not the embedding table."""


def solving(problem: Problem, head: Network) -> Network:
    """Returns a head whose outputs are those of a problem, of distributions but for numbers."""
    if problem == CHOICES:
        return ChoicesHead(head)
    return LabelsHead(head) if problem == LABELS else head


class _Key:
    """A config as a key: equal to another one of the same class with the same fields."""

    def __init__(self, config: Config):
        self.config = config
        self._fields = (type(config), config.to_json_string(use_diff=False))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._fields == other._fields

    def __hash__(self) -> int:
        return hash(self._fields)


@lru_cache(maxsize=64)
def _network(
    make_module: Callable[..., nnx.Module], config: _Key, *options: Rematerialize
) -> Network:
    """Returns a network; for an equal config the same one, which JAX has compiled already."""
    return Network(partial(make_module, copy.deepcopy(config.config), *options))


def require_choices_alone(auto_classes: Collection[str | None]) -> None:
    """Refuses experts that choose among texts beside others, which read one text an example."""
    if any(auto_class != MULTIPLE_CHOICE for auto_class in auto_classes):
        raise InputError(
            "config.json: experts of multiple choice read several texts an example and cannot "
            "share batches with others; learn them in a recipe of their own"
        )


def complete_head(
    head: Network, task_parameters: Mapping[str, Array], backbone: Mapping[str, Array]
) -> dict[str, Array]:
    """Returns the parameters of a head: those that the task keeps, the others of the backbone."""
    return {
        name: task_parameters[name] if name in task_parameters else backbone[name]
        for name in head.shapes
    }


class LastLayer(NamedTuple):
    """The last layer of a head: `logits = features @ weight.T + bias`.

    Attributes:
        weight: The name of its weight, `[C, H]`.
        bias: The name of its bias, `[C]`; None for a layer without one.
        scaled_only: True if its rows are given by the names of classes, and are not to be turned.
    """

    weight: str
    bias: str | None
    scaled_only: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its parameters."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


CLASSIFIER = LastLayer("classifier.weight", "classifier.bias")
"""The last layer of heads of one linear layer."""


class HeadForm(NamedTuple):
    """The heads of one `transformers` class of models.

    Attributes:
        module: Makes the module that each task keeps, from a config.
        last_layer: The last layer of such a head; None where none can be fitted.
        backbone: Makes the backbone of such models, where they lack a part of the family's.
        ignored: Name patterns of parameters that such an expert may bring and that are not used.
    """

    module: Callable[[Config], nnx.Module]
    last_layer: LastLayer | None = CLASSIFIER
    backbone: Callable[[Config, Rematerialize], nnx.Module] | None = None
    ignored: tuple[str, ...] = ()


HeadAxes = Mapping[str, tuple[int, int]]
"""Axis and number of attention heads by name pattern of the parameters that they lie in.

The axis is 0 for projections to queries, keys and values, and 1 for the output projection.
"""


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture family.

    Attributes:
        backbone: Makes the module that is merged, from a config.
        head: Makes the module that each task keeps, from a config.
        prefixes: Beginnings of backbone names that a checkpoint saved without its head may lack.
        inputs: Names of the arrays in a batch, the first one required.
        max_tokens: The length, in tokens, of the longest text that a model of a config can read;
            None for images.
        heads: The axis and number of attention heads in the parameters of a model of a config.
        last_layer: The last layer of a head, which can be fitted to the merged features; None for a
            language model, whose output layer is merged.
        auto_class: The `transformers` class that loads a task's model, or None where a head is
            no part of a checkpoint.
        base_only: Name patterns of backbone parameters that an expert may lack, and which then stay
            the base's. A CLIP expert is a vision tower, without the projection behind it.
        ignored: Name patterns, from a config, of tensors in a checkpoint that are no parameters.
        ignored_in_experts: Name patterns of parameters outside the backbone that an expert may
            bring and that are not used. Those of the base are carried into the merge.
        second_names_of_tables: Further names of embedding tables, by their own names, under which a
            checkpoint may have them: it has one of several tied tensors.
        renamed: Pairs of a part of names in a checkpoint and its replacement in the model that
            `transformers` makes of it, whose names adapters have; in the order of replacement.
        language: True for a model that predicts tokens, whose output layer is merged like all
            other parameters; False for a classifier, whose head each task keeps.
        cached_features: The features of a token's keys in one layer, all heads together, of a model
            of a config that generates text with a cache of keys and values; None where none does.
        bridged: True for a model that runs by its own PyTorch forward.
        embeds: The way from texts to embeddings of sentence embedders; None for other models. Their
            head gives embeddings in place of logits.
        embedding_backbone: Makes the backbone of sentence embedders, where that lacks a part.
        images: The images that a language model reads among its tokens; None if it reads none.
        blind: The reason for which a model that reads images among its tokens is learned from texts
            alone; None for others.
        output_layer: The name of a language model's output layer, where it is not the embedding
            table.
        further_heads: The heads of other `transformers` classes of such models than `auto_class`,
            by these classes.
        packs: True if the backbone computes texts in `TokenRows`, so that batches can be packed.
        reads_choices: True if each example is several texts, of which one is right.
        reads_any_size: True if images may have another size than the config states: the model reads
            them as its image processor makes them.
        head_with_rest: Makes the module of `head` together with the parts of the backbone that
            models of `further_heads` lack, where there are some.
        runs: True for a config whose models the family runs. Others of its type run by their own
            PyTorch forward.
    """

    backbone: Callable[[Config, Rematerialize], nnx.Module]
    head: Callable[[Config], nnx.Module]
    prefixes: tuple[str, ...]
    inputs: tuple[str, ...]
    max_tokens: Callable[[Config], int | None]
    heads: Callable[[Config], HeadAxes]
    auto_class: str | None
    last_layer: LastLayer | None = CLASSIFIER
    base_only: tuple[str, ...] = ()
    ignored: Callable[[Config], tuple[str, ...]] = lambda config: ("*.position_ids",)
    ignored_in_experts: tuple[str, ...] = ()
    second_names_of_tables: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()
    language: bool = False
    cached_features: Callable[[Config], int] | None = None
    bridged: bool = False
    embeds: EmbeddingForm | None = None
    embedding_backbone: Callable[[Config, Rematerialize], nnx.Module] | None = None
    images: ImagesInText | None = None
    blind: str | None = None
    output_layer: str = OUTPUT_LAYER
    further_heads: Mapping[str, HeadForm] = dataclasses.field(default_factory=dict)
    packs: bool = False
    reads_choices: bool = False
    reads_any_size: bool = False
    head_with_rest: Callable[[Config], nnx.Module] | None = None
    runs: Callable[[Config], bool] = lambda config: True

    @property
    def writes(self) -> bool:
        """True for a language model, which continues prompts."""
        return self.language

    @property
    def encodes_prompts(self) -> bool:
        """True for an encoder-decoder, whose prompts are not among the tokens that it continues."""
        return "decoder_input_ids" in self.inputs

    def head_form(self, auto_class: str | None = None) -> HeadForm:
        """Returns the heads of a `transformers` class of models.

        Args:
            auto_class: The class; None for `self.auto_class`.

        Raises:
            InputError: The family has no such heads.
        """
        if auto_class in (None, self.auto_class):
            return HeadForm(self.head, self.last_layer)
        if auto_class not in self.further_heads:
            raise InputError(
                f"config.json: models of the class {auto_class} are learned where one encoder "
                "reads a text, and this architecture has another; leave the expert out"
            )
        return self.further_heads[auto_class]

    def with_heads_of(self, auto_classes: Collection[str | None]) -> "Family":
        """Returns the family of models of these `transformers` classes side by side.

        The backbone has the parts that all of them have.

        Args:
            auto_classes: The classes; None for `self.auto_class`.

        Raises:
            InputError: The family has no heads of such a class.
        """
        if MULTIPLE_CHOICE in auto_classes:
            require_choices_alone(auto_classes)
            self.head_form(MULTIPLE_CHOICE)  # refuses a family without
            return dataclasses.replace(self, reads_choices=True)
        backbones = [self.head_form(auto_class).backbone for auto_class in auto_classes]
        backbone = next(filter(None, backbones), None)
        if backbone is None:
            return self
        head = self.head_with_rest or self.head
        return dataclasses.replace(self, backbone=backbone, head=head)

    def build_backbone(
        self, config: Config, rematerialize: Rematerialize = "elementwise"
    ) -> Network:
        """Returns the backbone, `(parameters, inputs, hidden_states=False) -> Outputs`."""
        network = _network(self.backbone, _Key(config), rematerialize)
        return ChoicesBackbone(network) if self.reads_choices else network

    def build_head(self, config: Config, problem: Problem = CLASSES) -> Network:
        """Returns the head, `(parameters, outputs) -> logits [B, C]`, `[B, T, V]` or `[B, C, 2]`.

        Parameters of it that a task does not keep are the backbone's.

        Args:
            config: The config of a task's model.
            problem: The problem that the head solves.
        """
        form = self.head_form(problem.auto_class)
        return solving(problem, _network(form.module, _Key(config)))

    def tied(self, config: Config) -> tuple[str, ...]:
        """Returns the names of the embedding tables that are the output layer too."""
        if not self.language:
            return ()
        return tuple(name for name in self.build_head(config).shapes if name != self.output_layer)

    def second_names(self, config: Config) -> dict[str, tuple[str, ...]]:
        """Returns the further names of each table that has several, which count without its own.

        Args:
            config: The config of the checkpoint. If the table is the output layer too, the name of
                that is one.
        """
        names = dict(self.second_names_of_tables)
        for name in self.tied(config):
            names[name] = (self.output_layer, *names.get(name, ()))
        return names


def attention_heads(
    query: str, key: str, value: str, output: str, part: str | None = None
) -> Callable[[Config], HeadAxes]:
    """Returns `Family.heads` from the name patterns of the four projections.

    Keys and values may have fewer heads than queries.

    Args:
        query: Pattern of the projections to queries.
        key: Pattern of the projections to keys.
        value: Pattern of the projections to values.
        output: Pattern of the output projections.
        part: The field of the config that holds the numbers of heads, if not the config itself.
    """

    def heads(config: Config) -> HeadAxes:
        config = getattr(config, part) if part else config
        count = config.num_attention_heads
        key_value = getattr(config, "num_key_value_heads", None) or count
        return {query: (0, count), key: (0, key_value), value: (0, key_value), output: (1, count)}

    return heads
