"""Diffusion pipelines whose components are matched by the names of their tensors."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from adamerge_jax.checkpoints.any_model import AnyModel, any_model, missing_prefix
from adamerge_jax.checkpoints.diffusion import LOADED_BY, Pipeline
from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.safetensors_file import TensorInfo
from adamerge_jax.errors import InputError, shorten

_OLDER = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}
"""Modules of attention as older versions of `diffusers` named them."""


def pipeline_family(base: Pipeline, experts: Sequence[Checkpoint]) -> AnyModel:
    """Returns the architecture of a diffusion pipeline; what experts alone have is left out.

    Args:
        base: The base.
        experts: The experts, of which some may be no pipelines, to be refused later.
    """
    family = any_model(base, experts, classes=())
    components = {name for e in experts if isinstance(e, Pipeline) for name in e.components}
    of_experts = [f"{name}.*" for name in sorted(components - base.components.keys())]
    return dataclasses.replace(
        family,
        auto_class=LOADED_BY if base.is_whole else "ModelMixin",
        ignored_in_experts=(*family.ignored_in_experts, *of_experts),
    )


def named_like(expert: Pipeline, base: Pipeline) -> Pipeline:
    """Returns an expert whose tensors have the base's names, where versions differ in them.

    `transformers` 5 saves a text encoder without the prefix `text_model.`, and `diffusers` renamed
    the attention of its autoencoders.

    Args:
        expert: The expert; a single component takes the place of the base's one of its class.
        base: The base.

    Raises:
        InputError: It is a single component that has no such place.
    """
    if base.is_whole and not expert.is_whole:
        expert = _as_component(expert, base)
    tensors: dict[str, TensorInfo] = {}
    for component, part in expert.components.items():
        of_base = base.components.get(component)
        renamed = {} if of_base is None else _renamed(part.tensors, of_base.tensors)
        for name, info in part.tensors.items():
            tensors[f"{component}.{renamed.get(name, name)}"] = info
    return dataclasses.replace(expert, tensors=tensors)


def _as_component(expert: Pipeline, base: Pipeline) -> Pipeline:
    """Returns a single component under the name of the base's one of its class.

    Raises:
        InputError: The base has none of its class, or several.
    """
    (part,) = expert.components.values()
    names = [n for n, other in base.components.items() if other.class_name == part.class_name]
    if len(names) != 1:
        raise InputError(
            f"{expert.source} is a single {shorten(part.class_name)}, of which the base "
            f"({base.source}) has {len(names)}; give a whole pipeline"
        )
    return dataclasses.replace(expert, components={names[0]: part})


def _renamed(names: Collection[str], base_names: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Returns the names in the base of those tensors that have another one there."""
    more, less = missing_prefix(names, base_names), missing_prefix(base_names, names)
    renamed: dict[str, str] = {}
    for name in names:
        candidates = [more + name, name.removeprefix(less)]
        for older, newer in _OLDER.items():
            candidates += [name.replace(older, newer), name.replace(newer, older)]
        other = next((other for other in candidates if other in base_names), None)
        if name not in base_names and other is not None:
            renamed[name] = other
    taken = {*names} - renamed.keys()
    is_unique = len({*renamed.values()}) == len(renamed) and taken.isdisjoint(renamed.values())
    return renamed if is_unique else {}
