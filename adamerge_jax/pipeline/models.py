"""A recipe's base and experts: found, checked and matched by name, before a weight is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from adamerge_jax.checkpoints.architecture import require_same_architecture
from adamerge_jax.checkpoints.hub import locate
from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.matching import MatchedCheckpoint, match, require_tied
from adamerge_jax.checkpoints.peft import Expert, is_adapter, open_adapter
from adamerge_jax.coefficients.file import Source
from adamerge_jax.coefficients.granularities import Shapes
from adamerge_jax.devices import ONE_DEVICE, Devices
from adamerge_jax.errors import InputError
from adamerge_jax.models import family_of
from adamerge_jax.models.family import OUTPUT_LAYER, Family
from adamerge_jax.parameter_names import matches, tensors_of, unstacked_shapes
from adamerge_jax.recipes.schema import ModelSource, Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclasses.dataclass(frozen=True)
class Models:
    """A base model and its experts, opened and matched by name; no weight has been read.

    Attributes:
        family: The architecture family of all of them.
        shapes: Shape of every parameter of the backbone, `(L, *shape)` where stacked.
        base: The base's checkpoint.
        experts: The experts' checkpoints by task.
        sources: Where they come from, for the coefficients file: the base, then the experts. Empty
            where no weight was to be read.
        kept: Names without `*` of the backbone's parameters that stay the base's.
        devices: Where the weights go when they are read.
    """

    family: Family
    shapes: Shapes
    base: MatchedCheckpoint
    experts: Mapping[str, Expert]
    sources: tuple[Source, ...]
    kept: frozenset[str]
    devices: Devices = ONE_DEVICE

    @property
    def by_name(self) -> dict[str, Expert]:
        """The base's checkpoint as `base`, then the experts' by task."""
        return {"base": self.base, **self.experts}

    @property
    def config(self) -> PretrainedConfig:
        """The base's config."""
        return self.base.checkpoint.config

    @property
    def prefix(self) -> str:
        """What the base's own tensors lack in front of the names that they have here.

        A base saved without a head has `encoder.layer...` for `bert.encoder.layer...`; the merged
        checkpoint has the experts' names, which every task's model shares.
        """
        name, in_file = next(iter(self.base.names.items()))
        return name.removesuffix(in_file) if name.endswith(in_file) else ""

    def tensors(self, name: str) -> list[str]:
        """The checkpoint tensors that a parameter of the backbone consists of."""
        return tensors_of(name, self.shapes[name])

    def head_names(self, task: str) -> list[str]:
        """Names of the parameters that a task's checkpoint has for its head."""
        return [name for name in self.experts[task].names if name not in self.base.names]


def open_models(recipe: Recipe, root: Path, *, read_weights: bool = True) -> Models:
    """Opens and checks the base and all experts of a recipe.

    Args:
        recipe: Says which.
        root: Folder that relative paths start from.
        read_weights: Whether to look into the weights: for their fingerprints, and for whether
            tied embeddings still are one. Otherwise only configs and headers are read.

    Raises:
        InputError: A checkpoint is missing, damaged, of another architecture or not for classes,
            or a pattern in `keep_from_base` fits no parameter.
    """
    with _explained("base", root):
        base = Checkpoint.open(resolve(recipe.base.path, root), revision=recipe.base.revision)
    family = family_of(base.config)
    shapes = {name: leaf.shape for name, leaf in family.build_backbone(base.config).shapes.items()}
    backbone = unstacked_shapes(shapes)
    for pattern in recipe.own_keep_from_base:
        if not any(matches(name, [pattern]) for name in backbone):
            raise InputError(
                f"keep_from_base: {pattern!r} fits no parameter; "
                f"parameters are called e.g. {next(iter(backbone))!r}"
            )
    base_match = _match_backbone(family, backbone, base, "base")
    experts = {
        task: _open_expert(
            family,
            backbone,
            base_match,
            task_recipe.expert,
            root,
            role=f"expert {task!r}",
            read_weights=read_weights,
        )
        for task, task_recipe in recipe.tasks.items()
    }
    kept = {
        name
        for name in backbone
        if matches(name, recipe.keep_from_base)
        or any(name not in expert.names for expert in experts.values())
    }
    if not read_weights:
        return Models(family, shapes, base_match, experts, (), frozenset(kept))
    for model in (base_match, *experts.values()):
        _require_tied(family, model)
    said = {"base": recipe.base} | {task: t.expert for task, t in recipe.tasks.items()}
    sources = tuple(
        Source(name, said[name].path, said[name].revision, model.identity())
        for name, model in {"base": base, **experts}.items()
    )
    return Models(family, shapes, base_match, experts, sources, frozenset(kept))


def match_backbone(models: Models, checkpoint: Checkpoint, role: str) -> MatchedCheckpoint:
    """Finds the backbone's parameters in another checkpoint of the same architecture.

    Raises:
        InputError: One is missing or has another shape, or embeddings are not the output layer
            although the config says so.
    """
    shapes = unstacked_shapes(models.shapes)
    found = _match_backbone(models.family, shapes, checkpoint, role)
    _require_tied(models.family, found)
    return found


def resolve(path: str, root: Path) -> str:
    """A path of a recipe against its root; what is not there stays as written: a Hub id.

    Raises:
        InputError: It is a folder of the current directory: it would be opened in place of what is
            on the Hub, and elsewhere the recipe would mean another model.
    """
    local = root / Path(path).expanduser()
    if local.exists():
        return str(local)
    if Path(path).is_dir():
        raise InputError(
            f"{path} is a folder of the current directory ({Path.cwd()}), where paths do not "
            "start; give its absolute path, or another root"
        )
    return path


def _match_backbone(
    family: Family, backbone: Shapes, checkpoint: Checkpoint, role: str
) -> MatchedCheckpoint:
    return match(
        checkpoint,
        backbone,
        role=role,
        prefixes=family.prefixes,
        ignored=family.ignored(checkpoint.config),
        second_names=_second_names(family, checkpoint.config),
        allow_extra=True,
    )


def _second_names(family: Family, config: PretrainedConfig) -> dict[str, str]:
    """The tensors that embedding tables may be saved as where they are the output layer too."""
    return dict.fromkeys(family.tied(config), OUTPUT_LAYER)


def _require_tied(family: Family, model: Expert) -> None:
    """Refuses a whole model with an output layer that it should not have beside its embeddings."""
    if isinstance(model, MatchedCheckpoint):
        for name in family.tied(model.checkpoint.config):
            require_tied(model, name, OUTPUT_LAYER)


def _open_expert(
    family: Family,
    backbone: Shapes,
    base: MatchedCheckpoint,
    source: ModelSource,
    root: Path,
    *,
    role: str,
    read_weights: bool,
) -> Expert:
    """Opens a whole fine-tuned model or a LoRA adapter."""
    has_classes = family.auto_class is not None and not family.language

    def head(config: PretrainedConfig) -> Shapes:
        if not has_classes:
            return {}
        return {name: leaf.shape for name, leaf in family.build_head(config).shapes.items()}

    with _explained(role, root):
        path = resolve(source.path, root)
        folder = locate(path, revision=source.revision)
    if is_adapter(folder):
        adapter = open_adapter(
            source.path,
            folder,
            base,
            role=role,
            head=head,
            prefixes=family.prefixes,
            ignored=family.ignored(base.checkpoint.config),
            unused=family.ignored_in_experts,
            renamed=family.renamed,
            tied=family.tied(base.checkpoint.config) if read_weights else (),
        )
        missing = [name for name in head(adapter.checkpoint.config) if name not in adapter.names]
        if missing:
            raise InputError(
                f"{role} ({source.path}) lacks {missing[0]}: an adapter for classification must "
                "bring its head; train it with modules_to_save"
            )
        if has_classes and adapter.checkpoint.config.num_labels < 2:
            raise _no_classes(role, source.path, "a head with 1 output")
        return adapter
    with _explained(role, root):
        expert = Checkpoint.in_folder(path, folder)
    require_same_architecture(base.checkpoint, expert, role=role)
    if has_classes:
        _require_classes(expert, role)
    return match(
        expert,
        backbone | head(expert.config),
        role=role,
        prefixes=family.prefixes,
        optional=family.base_only,
        ignored=(*family.ignored(expert.config), *family.ignored_in_experts),
        second_names=_second_names(family, expert.config),
    )


def _require_classes(expert: Checkpoint, role: str) -> None:
    """Refuses an expert whose outputs are not the logits of classes that exclude each other."""
    problem = expert.config.problem_type
    if problem not in (None, "single_label_classification"):
        raise _no_classes(role, expert.source, f"problem_type {problem!r} in its config.json")
    # What `transformers` takes for regression.
    if expert.config.num_labels < 2:
        found = f"num_labels {expert.config.num_labels} in its config.json"
        raise _no_classes(role, expert.source, found)


def _no_classes(role: str, source: str, found: str) -> InputError:
    return InputError(
        f"{role} ({source}) has {found}; an expert must give every example one of two or more "
        "classes: leave it out"
    )


@contextmanager
def _explained(role: str, root: Path) -> Iterator[None]:
    """Says in error messages what cannot be opened, and where relative paths start."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{role}: {error} (relative paths start at {root})") from error
