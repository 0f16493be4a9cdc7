"""The family of a model that has no family of its own here."""

import dataclasses
import re
import traceback
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from adamerge_jax.errors import InputError, in_one_line
from adamerge_jax.models.bridge.body import (
    AllButLastLayer,
    BaseModel,
    Body,
    NotDividedError,
    bodies_of,
)
from adamerge_jax.models.bridge.empty_model import empty_encoder, empty_model
from adamerge_jax.models.bridge.images import TorchImages
from adamerge_jax.models.bridge.networks import TorchBackbone, TorchHead
from adamerge_jax.models.bridge.torch_in_jax import torch_in_jax
from adamerge_jax.models.choices import ChoicesBackbone
from adamerge_jax.models.family import (
    Family,
    HeadForm,
    LastLayer,
    Network,
    require_choices_alone,
    solving,
)
from adamerge_jax.models.inputs import stated_image_shape
from adamerge_jax.models.layers import Config
from adamerge_jax.models.problem import (
    CHOICES,
    CLASSES,
    MULTIPLE_CHOICE,
    TOKEN_CLASSIFICATION,
    Problem,
)
from adamerge_jax.models.rematerialization import Rematerialize


class Kind(NamedTuple):
    """A kind of model.

    Attributes:
        auto_class: The `transformers` class that loads such models.
        classes: The table of `transformers` from model types to the classes of such models.
        language: True for a model that predicts tokens.
        inputs: The names of arrays that it may read, the first one required.
        images: True for a language model that reads images among its tokens.
    """

    auto_class: str
    classes: str
    language: bool
    inputs: tuple[str, ...]
    images: bool = False


_TEXT = ("input_ids", "attention_mask", "token_type_ids")

KINDS = (
    Kind(
        TOKEN_CLASSIFICATION,
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        False,
        _TEXT,
    ),
    Kind(MULTIPLE_CHOICE, "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES", False, _TEXT),
    Kind(
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        False,
        _TEXT,
    ),
    Kind(
        "AutoModelForImageClassification",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        False,
        ("pixel_values",),
    ),
    # Before language models, among which `transformers` counts some of these too.
    Kind(
        "AutoModelForImageTextToText",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        True,
        (*_TEXT[:2], "pixel_values"),
        images=True,
    ),
    Kind("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", True, _TEXT[:2]),
    Kind(
        "AutoModelForSeq2SeqLM",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        True,
        (*_TEXT[:2], *(f"decoder_{name}" for name in _TEXT[:2])),
    ),
)
"""The kinds of models whose coefficients are learned through their PyTorch forward."""


@dataclasses.dataclass(frozen=True)
class BridgedFamily(Family):
    """A family whose networks run a model's own PyTorch forward.

    Attributes:
        other_heads: The function from another `transformers` class of such models to its heads.
    """

    other_heads: Callable[[str], HeadForm] | None = None

    def build_backbone(
        self, config: Config, rematerialize: Rematerialize = "elementwise"
    ) -> Network:
        """Returns the backbone, `(parameters, inputs, hidden_states=False) -> Outputs`."""
        backbone = self.backbone(config, rematerialize)
        return ChoicesBackbone(backbone) if self.reads_choices else backbone

    def build_head(self, config: Config, problem: Problem = CLASSES) -> Network:
        """Returns the head, `(parameters, outputs) -> logits`."""
        return solving(problem, self.head_form(problem.auto_class).module(config))

    def with_heads_of(self, auto_classes: Collection[str | None]) -> Family:
        """Returns the family of models of these `transformers` classes side by side."""
        if MULTIPLE_CHOICE in auto_classes:
            require_choices_alone(auto_classes)
            return self
        others = {name for name in auto_classes if name not in (None, self.auto_class)}
        if not others or self.other_heads is None:
            return super().with_heads_of(auto_classes)
        heads = {name: self.other_heads(name) for name in sorted(others)}
        return dataclasses.replace(self, further_heads=heads)

    def tied(self, config: Config) -> tuple[str, ...]:
        """Returns the names of the embedding tables that are the output layer too."""
        if not self.language:
            return ()
        head = self.head(config)
        assert isinstance(head, TorchHead)
        return tuple(name for name in head.shapes if name in head.of_body)


def bridged_family(config: Config, architecture: str) -> Family:
    """Returns the family of a model that `transformers` has.

    Args:
        config: The config of the base model.
        architecture: The class of the experts' models, `DistilBertForSequenceClassification`.

    Raises:
        InputError: PyTorch or torchax is missing, models of this class are of no kind that is
            learned, or an operation of theirs cannot run in JAX.
    """
    kind = kind_of(config, architecture)
    if kind is None:
        raise InputError(
            f"config.json: coefficients cannot be learned for a {architecture} of model_type "
            f"{config.model_type!r}; {_STILL_FOLDS}"
        )
    family = _family(kind, partial(empty_model, kind.auto_class), config)
    return dataclasses.replace(family, other_heads=partial(_heads_beside, family, config))


def _heads_beside(family: Family, config: Config, auto_class: str) -> HeadForm:
    """Returns the heads of another class of models than the one that a family is of.

    Raises:
        InputError: The two have another backbone.
    """
    make_empty = partial(empty_model, auto_class)
    model = make_empty(config)
    backbone = TorchBackbone(BaseModel(model), "nothing", language=False)
    if backbone.shapes != family.build_backbone(config, "nothing").shapes:
        raise InputError(
            f"config.json: a {type(model).__name__} has another backbone than the models of "
            f"{family.auto_class} beside it; learn them in recipes of their own"
        )
    other = dataclasses.replace(
        family, auto_class=auto_class, head=lambda config: TorchHead(BaseModel(make_empty(config)))
    )
    _require_runnable(other, config, has_head=True)
    return HeadForm(other.head, _last_layer(BaseModel(model)))


def bridged_encoder(config: Config) -> Family:
    """Returns the family of a model that `transformers` has, without a head.

    Args:
        config: The config of the base model.

    Raises:
        InputError: PyTorch or torchax is missing, it reads no texts, or an operation of it cannot
            run in JAX.
    """
    kind = Kind("AutoModel", "MODEL_MAPPING_NAMES", False, _TEXT)
    return _family(kind, empty_encoder, config, has_head=False)


def kind_of(config: Config, architecture: str) -> Kind | None:
    """Returns the kind of a class of models of `transformers`; None if it is of none.

    Args:
        config: The config of a model.
        architecture: The class of the model, or the one that loads it
            (`AutoModelForSequenceClassification`).
    """
    for kind in KINDS:
        classes = getattr(modeling_auto, kind.classes).get(config.model_type, ())
        names = (classes,) if isinstance(classes, str) else classes
        if architecture in names or (names and architecture == kind.auto_class):
            return kind
    return None


def _family(
    kind: Kind,
    make_empty: Callable[[Config], PreTrainedModel],
    config: Config,
    *,
    has_head: bool = True,
) -> BridgedFamily:
    """Returns the family of models that a function makes without values, if they run in JAX.

    A model that reads images among its tokens, and in which they cannot be read in JAX, is one of
    texts alone.
    """
    torch_in_jax()
    model = make_empty(config)
    ways = bodies_of(model) if has_head else [BaseModel]
    if not ways:
        raise InputError(
            f"config.json: a {type(model).__name__} has no part that ends before its output layer, "
            f"so that its coefficients cannot be learned; {_STILL_FOLDS}"
        )
    kinds = [kind, _of_texts(kind, config)] if kind.images else [kind]
    refusals: list[InputError] = []
    for chosen in kinds:
        for way in ways:
            try:
                family = _family_of_body(chosen, way, make_empty, model)
                _require_runnable(family, config, has_head=has_head)
            except InputError as refusal:
                refusals.append(refusal)
                continue
            if kind.images and not chosen.images:
                return dataclasses.replace(family, blind=_cause_of(_told(refusals)))
            return family
    raise _told(refusals[: len(ways)])


def _told(refusals: Sequence[InputError]) -> InputError:
    """Returns the refusal that says most: the first one that is not about ways of dividing."""
    reasons = [one for one in refusals if not isinstance(one.__cause__, NotDividedError)]
    return reasons[0] if reasons else refusals[0]


def _cause_of(refusal: InputError) -> str:
    """Returns the cause of a refusal, without what is still possible."""
    return str(refusal).removeprefix("config.json: ").removesuffix(f"; {_STILL_FOLDS}")


def _of_texts(kind: Kind, config: Config) -> Kind:
    """Returns a kind of models that read images among tokens, without images."""
    names = _TEXT[:2]
    if config.is_encoder_decoder:
        names += tuple(f"decoder_{name}" for name in names)
    return kind._replace(images=False, inputs=names)


def _family_of_body(
    kind: Kind,
    way: type[BaseModel] | type[AllButLastLayer],
    make_empty: Callable[[Config], PreTrainedModel],
    model: PreTrainedModel,
) -> BridgedFamily:
    """Returns the family of models that are divided in one way."""
    images = TorchImages(model) if kind.images else None
    body = way(model)
    reads = TorchBackbone(body, "nothing", language=kind.language).inputs
    if kind.inputs[0] not in reads:
        raise InputError(
            f"config.json: the base model of a {type(model).__name__} reads no {kind.inputs[0]}, "
            f"so that its coefficients cannot be learned; {_STILL_FOLDS}"
        )
    last = None
    if not kind.language:
        last = _last_layer(body, 1 if kind.auto_class == MULTIPLE_CHOICE else None)
    return BridgedFamily(
        backbone=lambda config, rematerialize: TorchBackbone(
            way(make_empty(config)), rematerialize, language=kind.language, images=images
        ),
        head=lambda config: TorchHead(way(make_empty(config))),
        prefixes=(f"{model.base_model_prefix}.",),
        inputs=tuple(name for name in kind.inputs if name in reads),
        max_tokens=lambda config: None if kind.inputs[0] != "input_ids" else _longest(model),
        heads=lambda config: {},
        auto_class=kind.auto_class,
        ignored=lambda config: _NOT_MERGED,
        ignored_in_experts=_counters(model),
        reads_choices=kind.auto_class == MULTIPLE_CHOICE,
        last_layer=last,
        language=kind.language,
        bridged=True,
        images=images,
    )


_STILL_FOLDS = (
    "merges without learning still work: adamerge merge, and adamerge fold with coefficients of "
    "your own"
)


def _longest(model: PreTrainedModel) -> int | None:
    """Returns the number of tokens that the model has positions for; None for any number."""
    config = model.config.get_text_config()
    size = getattr(config, "max_position_embeddings", None)
    sizes = [int(size) if isinstance(size, float) else size]
    # The positions of an image's patches are no limit of texts.
    for name, module in model.named_modules() if config is model.config else ():
        if isinstance(module, torch.nn.Embedding) and "position" in name.rpartition(".")[2]:
            offset = getattr(module, "offset", 0)
            if module.padding_idx is not None:
                offset = module.padding_idx + 1
            sizes.append(module.num_embeddings - offset)
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=None)


_NOT_MERGED = ("*.position_ids", "*.inv_freq", "*.attn.bias", "*.attn.masked_bias")
"""Name patterns of tensors that are computed: positions and masks."""


def _counters(model: PreTrainedModel) -> tuple[str, ...]:
    """Returns the names of tensors of whole numbers, of which a merge has the base's."""
    tensors = model.state_dict()
    return tuple(name for name, tensor in tensors.items() if not tensor.is_floating_point())


def _last_layer(body: Body, outputs: int | None = None) -> LastLayer | None:
    """Returns the last linear layer with an output for each class; None where there is none.

    Args:
        body: The body of a model.
        outputs: The outputs of that layer, where there is not one for each class.
    """
    last = None
    for name, module in body.model.named_modules():
        if (
            isinstance(module, torch.nn.Linear)
            and not body.has(name)
            and module.out_features == (outputs or body.model.config.num_labels)
        ):
            bias = None if module.bias is None else f"{name}.bias"
            last = LastLayer(f"{name}.weight", bias)
    return last


def _require_runnable(family: Family, config: Config, *, has_head: bool) -> None:
    """Refuses a model with an operation that JAX does not have; nothing is computed."""
    backbone = family.build_backbone(config, "nothing")
    head = family.build_head(config, CHOICES if family.reads_choices else CLASSES)

    def run(parameters: Any, head_parameters: Any, inputs: Any) -> Any:
        outputs = backbone(parameters, inputs)
        return head({**parameters, **head_parameters}, outputs) if has_head else outputs

    try:
        jax.eval_shape(run, backbone.shapes, head.shapes, _example(family, config))
    # PyTorch's code for a model may raise anything.
    except Exception as error:
        raise InputError(
            f"config.json: model_type {config.model_type!r} has no family here, and its PyTorch "
            f"forward cannot run in JAX: {_operation_of(error)}; {_STILL_FOLDS}"
        ) from error


def _example(family: Family, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch."""
    if isinstance(family.images, TorchImages):
        return family.images.example(2, 8)
    if family.inputs[0] == "input_ids":
        shape = (2, 3, 8) if family.reads_choices else (2, 8)
        return {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in family.inputs}
    # A ResNet reads images of any size.
    of_images = (2, *(stated_image_shape(config) or (getattr(config, "num_channels", 3), 32, 32)))
    return {"pixel_values": jax.ShapeDtypeStruct(of_images, jnp.float32)}


_OF_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerBoolConversionError,
)
"""Errors of code that decides by values, or takes as many entries as they say."""


def _operation_of(error: Exception) -> str:
    """Returns the operation that an error names, and its place in the model's code."""
    operation = re.search(r"Operator with name (\S+) has no lowering", str(error))
    if operation:
        reason = f"operation {operation[1]} has no counterpart"
    elif isinstance(error, _OF_VALUES):
        reason = "what it does depends on values, which are not known while JAX compiles it"
    else:
        reason = in_one_line(error)[:200]
    calls = traceback.extract_tb(error.__traceback__)
    places = [call for call in calls if "/transformers/models/" in call.filename]
    if not places:
        return reason
    return f"{reason} ({Path(places[-1].filename).name}, line {places[-1].lineno})"
