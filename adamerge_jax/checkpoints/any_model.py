"""Models of any architecture, known by the names and shapes of their tensors alone.

They can be merged and folded, which takes no forward pass.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

import jax

from adamerge_jax.checkpoints.config_file import classes_of
from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.matching import PARAMETER_DTYPES, TOKEN_EMBEDDINGS
from adamerge_jax.checkpoints.renamed import common_name, current_name
from adamerge_jax.checkpoints.safetensors_file import TensorInfo
from adamerge_jax.errors import InputError
from adamerge_jax.models.family import OUTPUT_LAYER, Family, Network
from adamerge_jax.models.layers import Config, Rematerialize
from adamerge_jax.models.problem import CLASSES, Problem
from adamerge_jax.parameter_names import matches, place_in_stack

_WITH_OWN_HEAD = re.compile(r"For\w*(Classification|Answering|MultipleChoice|Prediction)$")
"""Classes of models whose head belongs to their task."""

_WRITING = re.compile(r"(ForCausalLM|ForConditionalGeneration|LMHeadModel)$")
"""Classes of models that write text."""

_LOADING = re.compile(r"AutoModelFor")
"""Classes that load models of a kind."""


class WithoutForward(Network):
    """A network that cannot be run.

    Attributes:
        shapes: Shape and dtype of every parameter by name, `[L, *shape]` where stacked.
    """

    def __init__(self, shapes: Mapping[str, jax.ShapeDtypeStruct]):
        """Takes the parameters."""
        self.shapes = dict(shapes)

    def __call__(self, *arguments: Any, **options: Any) -> NoReturn:
        """Refuses to run.

        Raises:
            InputError: Always.
        """
        raise InputError("this model can be merged and folded, but not run")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyModel(Family):
    """The architecture of models that are merged by the names of their tensors.

    Attributes:
        shapes: Shape and dtype of every merged parameter, `[L, *shape]` where stacked.
        table: The embedding table that is the output layer too; None where there is none.
    """

    shapes: Mapping[str, jax.ShapeDtypeStruct]
    table: str | None

    def build_backbone(
        self, config: Config, rematerialize: Rematerialize = "elementwise"
    ) -> WithoutForward:
        """Returns the parameters, which cannot be run."""
        return WithoutForward(self.shapes)

    def build_head(self, config: Config, problem: Problem = CLASSES) -> WithoutForward:
        """Returns no parameters: those of a head are told by an expert, see `head_of`."""
        return WithoutForward({})

    def tied(self, config: Config) -> tuple[str, ...]:
        """Returns the name of the embedding table that is the output layer too."""
        return () if self.table is None else (self.table,)


def any_model(
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    *,
    classes: Sequence[str],
    adapted: Collection[str] = (),
    headless: bool = False,
) -> AnyModel:
    """Returns the architecture of a base and its experts, of which only headers are read.

    All floating tensors of the base that have values are parameters, but for heads. A name's first
    number is that of its layer; layers are stacked where all of them have the tensor in one shape.

    Args:
        base: The base.
        experts: The experts that are whole models, not adapters.
        classes: The classes of the first expert's model; of an adapter perhaps the one of
            `transformers` that loads it (`AutoModelForSequenceClassification`).
        adapted: The names of parameters that an adapter changes, where all experts are adapters.
        headless: True for models without heads. A base that was saved with one has a prefix before
            all other names, which parameters lack as in the experts.
    """
    of_base = _common_names(base)
    of_expert = _common_names(experts[0]) if experts else of_base
    prefix = missing_prefix(of_base, of_expert) or _prefix_in(adapted, of_base)
    lacking = missing_prefix(of_expert, of_base)
    heads = {name for expert in experts for name in head_shapes(expert)}
    infos = {}
    for in_file, info in base.tensors.items():
        name = prefix + current_name(in_file)
        if _has_values(info) and name not in heads:
            infos[name] = info
    if headless:
        infos = {
            name.removeprefix(lacking): info
            for name, info in infos.items()
            if name.startswith(lacking)
        }
    table = _tied_table(base.config, infos)
    others = {
        name
        for expert in experts
        for name, info in expert.tensors.items()
        if info.dtype not in PARAMETER_DTYPES or _is_empty(base.tensors.get(name))
    }
    return AnyModel(
        backbone=_not_made,
        head=_not_made,
        prefixes=tuple(filter(None, (prefix, lacking))),
        inputs=(),
        max_tokens=lambda config: None,
        heads=lambda config: {},
        auto_class=next(filter(_LOADING.match, classes), "AutoModel"),
        last_layer=None,
        base_only=("*",),
        ignored=lambda config: () if table is None else (OUTPUT_LAYER,),
        ignored_in_experts=tuple(map(_literal, sorted(others))),
        language=any(map(_WRITING.search, classes)),
        shapes=_stacked(infos),
        table=table,
    )


def head_shapes(expert: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors that an expert keeps for its task.

    They are those outside of the module with most tensors, in a class of models whose head belongs
    to its task.
    """
    if not any(map(_WITH_OWN_HEAD.search, classes_of(expert.config_fields))):
        return {}
    modules = Counter(name.partition(".")[0] for name in expert.tensors)
    backbone = modules.most_common(1)[0][0]
    return {
        name: info.shape
        for name, info in expert.tensors.items()
        if name.partition(".")[0] != backbone and info.dtype in PARAMETER_DTYPES
    }


def _has_values(info: TensorInfo) -> bool:
    """Returns True for a tensor of numbers that can be merged."""
    return info.dtype in PARAMETER_DTYPES and not _is_empty(info)


def _is_empty(info: TensorInfo | None) -> bool:
    """Returns True for a tensor without values, such as that of no register tokens."""
    return info is not None and 0 in info.shape


def _not_made(*arguments: Any) -> NoReturn:
    raise NotImplementedError("a model of any architecture has no module")


def _common_names(checkpoint: Checkpoint) -> dict[str, None]:
    """Returns the names of a checkpoint's tensors that do not depend on who saved them."""
    model_type = checkpoint.config.model_type
    return dict.fromkeys(common_name(name, model_type) for name in checkpoint.tensors)


def missing_prefix(without: Collection[str], names: Collection[str]) -> str:
    """Returns the prefix with which most names of one checkpoint are in another; '' for none."""
    missing = [name for name in without if name not in names]
    if 2 * len(missing) < len(without):
        return ""
    prefixes = Counter(
        name.removesuffix(short)
        for short in missing[:50]
        for name in names
        if name.endswith("." + short)
    )
    return prefixes.most_common(1)[0][0] if prefixes else ""


def _prefix_in(adapted: Collection[str], names: Collection[str]) -> str:
    """Returns the prefix with which an adapter has the names of most of its parameters."""
    prefixes = Counter(
        name[:start]
        for name in adapted
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", name)))
        if name[start:] in names
    )
    return prefixes.most_common(1)[0][0] if prefixes else ""


def _tied_table(config: Config, names: Collection[str]) -> str | None:
    """Returns the one embedding table that is the output layer too.

    That is so where the config says it and the base's file has no output layer.
    """
    tables = [name for name in names if matches(name, TOKEN_EMBEDDINGS) and name != OUTPUT_LAYER]
    is_tied = getattr(config, "tie_word_embeddings", False) and OUTPUT_LAYER not in names
    return tables[0] if is_tied and len(tables) == 1 else None


def _stacked(infos: Mapping[str, TensorInfo]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the parameters that tensors make up: stacked by the first number of their names."""
    layers: dict[str, dict[int, str]] = {}
    for name in infos:
        if place := place_in_stack(name):
            layers.setdefault(place[0], {})[place[1]] = name
    parameters = {}
    for name, info in infos.items():
        place = place_in_stack(name)
        stack = layers[place[0]] if place else {}
        is_whole = bool(stack) and sorted(stack) == [*range(len(stack))]
        shapes = {(infos[other].shape, infos[other].merged_dtype) for other in stack.values()}
        if place and is_whole and len(shapes) == 1 and _is_plain(place, name):
            parameters[place[0]] = jax.ShapeDtypeStruct(
                (len(stack), *info.shape), info.merged_dtype
            )
        else:
            parameters[name] = jax.ShapeDtypeStruct(info.shape, info.merged_dtype)
    return parameters


def _is_plain(place: tuple[str, int], name: str) -> bool:
    """Returns True if a layer's number is written without zeros before it."""
    return place[0].replace("*", str(place[1]), 1) == name


def _literal(name: str) -> str:
    """Returns the pattern that fits one name alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
