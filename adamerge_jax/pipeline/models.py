"""The base and experts of a recipe, opened, checked and matched by name; no weight is loaded."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from adamerge_jax.checkpoints.any_model import AnyModel, any_model, head_shapes
from adamerge_jax.checkpoints.architecture import require_same_architecture
from adamerge_jax.checkpoints.diffusion import (
    Pipeline,
    absent_components,
    require_all_components,
    require_same_pipeline,
)
from adamerge_jax.checkpoints.diffusion_matching import named_like, pipeline_family
from adamerge_jax.checkpoints.gguf_model import (
    GgufCheckpoint,
    require_config,
    require_same_sizes,
)
from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.matching import (
    MatchedCheckpoint,
    differs,
    match,
    require_tied,
)
from adamerge_jax.checkpoints.missing import require_most
from adamerge_jax.checkpoints.opening import open_checkpoint, open_in_folder
from adamerge_jax.checkpoints.peft import (
    Expert,
    MatchedAdapter,
    is_adapter,
    open_adapter,
)
from adamerge_jax.checkpoints.peft_config import model_name
from adamerge_jax.checkpoints.peft_tensors import parameter_names
from adamerge_jax.checkpoints.sentence_modules import is_embedder, read_embedding_form
from adamerge_jax.checkpoints.vocabulary import TokenRows
from adamerge_jax.coefficients.file import Source
from adamerge_jax.coefficients.granularities import Shapes
from adamerge_jax.devices import ONE_DEVICE, Devices
from adamerge_jax.errors import InputError, in_hand
from adamerge_jax.models import family_of, is_known
from adamerge_jax.models.embedding_form import EmbeddingForm
from adamerge_jax.models.family import Family, HeadForm, Network
from adamerge_jax.models.problem import CLASSES, WORDS, Problem, auto_class_of, problem_of
from adamerge_jax.parameter_names import matches, tensors_of, unstacked_shapes
from adamerge_jax.pipeline.embedders import shared_form
from adamerge_jax.pipeline.located import (
    Located,
    classes_of_expert,
    locate_expert,
    opening,
    resolve,
    shared_architecture,
    with_padding,
    with_rows_of_tokenizer,
)
from adamerge_jax.recipes.schema import ModelSource, Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Models:
    """A base model and its experts, opened and matched by name; no weight has been read.

    Attributes:
        family: The architecture family of all of them.
        shapes: The shape of every parameter of the backbone, `(L, *shape)` where stacked.
        base: The base's checkpoint.
        experts: The experts' checkpoints by task.
        sources: The origins of the models for the coefficients file: the base, then the experts.
            Empty if no weight was to be read.
        kept_from_base: The names without `*` of the backbone's parameters that stay the base's.
        devices: The devices that hold the weights when they are read.
        problems: The problem that the head of each expert solves, by task.
        added_tokens: The tokens of the merge by id that the base's own tables have no rows for.
    """

    family: Family
    shapes: Shapes
    base: MatchedCheckpoint
    experts: Mapping[str, Expert]
    sources: tuple[Source, ...]
    kept_from_base: frozenset[str]
    devices: Devices = ONE_DEVICE
    problems: Mapping[str, Problem] = dataclasses.field(default_factory=dict)
    added_tokens: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def head_form(self, task: str) -> HeadForm:
        """Returns the form of a task's head."""
        return self.family.head_form(self.problems[task].auto_class)

    def auto_class(self, task: str) -> str | None:
        """Returns the `transformers` class of a task's model; None for zero-shot models."""
        return self.problems[task].auto_class or self.family.auto_class

    def build_head(self, task: str) -> Network:
        """Returns the head of a task as a function of its parameters."""
        config = self.experts[task].checkpoint.config
        return self.family.build_head(config, self.problems[task])

    @property
    def by_name(self) -> dict[str, Expert]:
        """The base's checkpoint as `base`, then the experts' by task."""
        return {"base": self.base, **self.experts}

    @property
    def only_adapters(self) -> bool:
        """True where every expert is an adapter whose task vectors are factors."""
        return all(
            isinstance(expert, MatchedAdapter) and all(map(expert.has_factors, expert.factors))
            for expert in self.experts.values()
        )

    @property
    def notes(self) -> list[str]:
        """Sentences on what is not read as it lies in files, each with its model."""
        models = (self.base, *self.experts.values())
        notes = [f"{model.role}: {note}" for model in models for note in model.checkpoint.notes]
        if self.family.blind is not None:
            notes.append(
                "base: coefficients are learned from texts alone, as its images cannot be read: "
                f"{self.family.blind}"
            )
        return notes

    @property
    def config(self) -> PretrainedConfig:
        """The base's config."""
        return self.base.checkpoint.config

    @property
    def prefix(self) -> str:
        """The prefix that names of parameters have and the base's own tensors lack.

        A base saved without a head has `encoder.layer...` for `bert.encoder.layer...`; the merged
        checkpoint has the experts' names, which every task's model shares.
        """
        name, in_file = next(iter(self.base.names.items()))
        return name.removesuffix(in_file) if name.endswith(in_file) else ""

    def tensors(self, name: str) -> list[str]:
        """Returns the names of the checkpoint tensors that make up a parameter of the backbone."""
        return tensors_of(name, self.shapes[name])

    @property
    def replaced(self) -> list[str]:
        """The names in the base's files of tensors that each task's head has in their place."""
        of_heads = {
            name
            for task, expert in self.experts.items()
            for name in self.head_names(task)
            if not (isinstance(expert, MatchedAdapter) and name in expert.of_base)
        }
        return [name for name in self.base.extra if {name, self.prefix + name} & of_heads]

    def head_names(self, task: str) -> list[str]:
        """Returns the names of the head's parameters in a task's checkpoint."""
        return [name for name in self.experts[task].names if name not in self.base.names]


def open_models(
    recipe: Recipe, root: Path, *, read_weights: bool = True, to_run: bool = True
) -> Models:
    """Opens and checks the base and all experts of a recipe.

    Args:
        recipe: The recipe that names them.
        root: Folder that relative paths start from.
        read_weights: If True, weights are read for their fingerprints and for the check that tied
            embeddings are equal; otherwise only configs and headers are.
        to_run: If False, models of an architecture without a family here are opened too, which can
            be merged and folded.

    Raises:
        InputError: A checkpoint is missing, damaged, of another architecture or no classifier, or
            a pattern in `keep_from_base` fits no parameter.
    """
    with opening("base", recipe.base, root):
        base = open_checkpoint(resolve(recipe.base.path, root), revision=recipe.base.revision)
        if isinstance(base, Pipeline):
            require_all_components(base)
        require_config(base)
    located = {
        task: locate_expert(f"expert {task!r}", task_recipe.expert, root)
        for task, task_recipe in recipe.tasks.items()
    }
    base, added_tokens = with_rows_of_tokenizer(base, located.get(recipe.tokenizer or ""))
    is_pipeline = isinstance(base, Pipeline)
    classes = {} if is_pipeline else {t: classes_of_expert(base, e) for t, e in located.items()}
    base = with_padding(base, located, classes)
    embeds = _read_form(base, located)
    whole_experts = {} if to_run else _whole_experts(base, located)
    architecture = shared_architecture(classes.values()) if to_run and not is_pipeline else None
    with _of_base(recipe.base, base):
        if not to_run:
            family = _family_to_fold(base, located, classes, list(whole_experts.values()), embeds)
        elif isinstance(base, Pipeline):
            raise InputError(
                "a diffusion pipeline is merged without learning (adamerge merge, adamerge "
                "fold); there is nothing to learn its coefficients from"
            )
        else:
            family = family_of(base.config, architecture, embeds=embeds)
    has_heads = _has_heads(family)
    auto_classes = {task: auto_class_of(classes[task]) if has_heads else None for task in located}
    with _of_base(recipe.base, base):
        if has_heads:
            family = family.with_heads_of(auto_classes.values())
        network = family.build_backbone(base.config)
    shapes = {name: leaf.shape for name, leaf in network.shapes.items()}
    backbone = unstacked_shapes(shapes)
    for pattern in recipe.own_keep_from_base:
        if not any(matches(name, [pattern]) for name in backbone):
            raise InputError(
                f"keep_from_base: {pattern!r} fits no parameter; "
                f"parameters are called e.g. {next(iter(backbone))!r}"
            )
    base_match = _match_backbone(family, backbone, base, "base")
    token_rows = TokenRows(base_match, added_tokens)
    experts = {}
    for task, place in located.items():
        with in_hand(place.source.path):
            experts[task] = _open_expert(
                family,
                backbone,
                base_match,
                place,
                opened=whole_experts.get(task),
                base_source=recipe.base,
                token_rows=token_rows,
                read_weights=read_weights,
                auto_class=auto_classes[task],
            )
    problems = {
        task: problem_of(auto_classes[task], expert.checkpoint.config) if has_heads else CLASSES
        for task, expert in experts.items()
    }
    if isinstance(family, AnyModel):
        for expert in experts.values():
            if isinstance(expert, MatchedCheckpoint):
                absent = absent_components(base, expert.checkpoint)
                require_most(base_match, expert, [*recipe.keep_from_base, *absent])
    kept_from_base = frozenset(
        name
        for name in backbone
        if matches(name, recipe.keep_from_base)
        or any(name not in expert.names for expert in experts.values())
    )
    models = Models(
        family,
        shapes,
        base_match,
        experts,
        (),
        kept_from_base,
        problems=problems,
        added_tokens=added_tokens,
    )
    if not read_weights:
        return models
    for model in (base_match, *experts.values()):
        _require_tied(family, model)
    mixed = base_match.names.keys() - kept_from_base
    for expert in experts.values() if mixed else ():
        _warn_of_no_change(base_match, expert, mixed)
    given = {"base": recipe.base} | {task: t.expert for task, t in recipe.tasks.items()}
    sources = tuple(
        Source(name, given[name].path, given[name].revision, model.identity())
        for name, model in {"base": base_match, **experts}.items()
    )
    return dataclasses.replace(models, sources=sources)


def match_backbone(models: Models, checkpoint: Checkpoint, role: str) -> MatchedCheckpoint:
    """Finds the backbone's parameters in another checkpoint of the same architecture.

    Raises:
        InputError: A parameter is missing or has another shape, or embeddings are not the output
            layer although the config says so.
    """
    shapes = unstacked_shapes(models.shapes)
    matched = _match_backbone(models.family, shapes, checkpoint, role)
    _require_tied(models.family, matched)
    return matched


def _has_heads(family: Family) -> bool:
    """Returns True if each task of a family's models keeps a head of its own."""
    return (
        family.auto_class is not None
        and not family.language
        and not isinstance(family, AnyModel)
        and family.embeds is None
    )


def _read_form(base: Checkpoint, located: Mapping[str, Located]) -> EmbeddingForm | None:
    """Reads the module files of the experts; None if these are no sentence embedders."""
    features = getattr(base.config, "hidden_size", None)
    forms: dict[str, EmbeddingForm | None] = {}
    for task, expert in located.items():
        with expert.opening():
            folder = expert.folder
            forms[task] = read_embedding_form(folder, features) if is_embedder(folder) else None
    return shared_form(forms)


def _family_to_fold(
    base: Checkpoint,
    located: Mapping[str, Located],
    classes: Mapping[str, Sequence[str]],
    experts: Sequence[Checkpoint],
    embeds: EmbeddingForm | None,
) -> Family:
    """Returns the family of models that are not run: that of any model where none here fits.

    Args:
        base: The base.
        located: The experts by task.
        classes: The classes of their models.
        experts: Those that are whole models, opened.
        embeds: The way from texts to embeddings of sentence embedders.
    """
    if isinstance(base, Pipeline):
        return pipeline_family(base, experts)
    if is_known(base.config):
        try:
            family = family_of(base.config, embeds=embeds)
            family.build_backbone(base.config)
        except InputError as error:  # a feature that only running needs
            log.debug(f"{base.source} is merged by the names of its tensors: {error}")
        else:
            if all(_is_class_of(family, names) for names in classes.values()):
                return family
    task, first = next(iter(located.items()))
    adapted: list[str] = []
    if not experts:
        with in_hand(first.source.path):
            adapted = parameter_names(first.path, first.folder, role=first.role)
    family = any_model(
        base, experts, classes=classes[task], adapted=adapted, headless=embeds is not None
    )
    return dataclasses.replace(family, embeds=embeds)


def _is_class_of(family: Family, classes: Sequence[str]) -> bool:
    """Returns True if one of a model's classes has a head that a family knows."""
    if family.auto_class is None or not classes:
        return True
    heads = [name.removeprefix("AutoModel") for name in (family.auto_class, *family.further_heads)]
    if heads[0] == "ForSeq2SeqLM":
        heads[0] = "ForConditionalGeneration"
    return any(name.endswith(head) for name in classes for head in heads)


def _whole_experts(base: Checkpoint, located: Mapping[str, Located]) -> dict[str, Checkpoint]:
    """Opens the experts of a recipe that are whole models, by task; pipelines as the base names."""
    experts = {}
    for task, place in located.items():
        with place.opening():
            if not is_adapter(place.folder):
                expert = open_in_folder(place.path, place.folder)
                if isinstance(base, Pipeline) and isinstance(expert, Pipeline):
                    expert = named_like(expert, base)
                experts[task] = expert
    return experts


def _match_backbone(
    family: Family, backbone: Shapes, checkpoint: Checkpoint, role: str
) -> MatchedCheckpoint:
    return match(
        checkpoint,
        backbone,
        role=role,
        prefixes=family.prefixes,
        ignored=family.ignored(checkpoint.config),
        second_names=family.second_names(checkpoint.config),
        allow_extra=True,
    )


def _require_tied(family: Family, model: Expert) -> None:
    """Refuses a whole model whose output layer differs from the embeddings that it is tied to."""
    if isinstance(model, MatchedCheckpoint):
        for name in family.tied(model.checkpoint.config):
            require_tied(model, name, family.output_layer)


def _warn_of_no_change(base: MatchedCheckpoint, expert: Expert, mixed: Collection[str]) -> None:
    """Warns of an expert that is the base, whose coefficients have no effect."""
    where = f"{expert.role} ({expert.checkpoint.source})"
    if isinstance(expert, MatchedAdapter):
        if expert.is_untrained():
            log.warning(
                "%s is untrained: every B factor is 0, so that its coefficients change nothing",
                where,
            )
    elif not differs(expert, base, sorted(mixed & expert.names.keys())):
        log.warning(
            "%s has the base's weights in all that is merged, so that its coefficients change "
            "nothing; check that it is the fine-tuned model",
            where,
        )


def _warn_of_other_base(adapter: MatchedAdapter, base: ModelSource) -> None:
    """Warns of an adapter that names another base than the recipe does."""
    trained_on = adapter.trained_on
    names = (base.path, str(adapter.base.checkpoint.folder), _name_in_config(adapter.base))
    if trained_on and all(model_name(trained_on) != model_name(name) for name in names if name):
        log.warning(
            "%s (%s) says that it was trained on %s (base_model_name_or_path), and the base of "
            "the recipe is %s; check that these are one model",
            adapter.role,
            adapter.checkpoint.source,
            trained_on,
            base.path,
        )


def _name_in_config(model: MatchedCheckpoint) -> str | None:
    """Returns the name under which older versions of `transformers` saved a model."""
    name = model.checkpoint.config_fields.get("_name_or_path")
    return name if isinstance(name, str) else None


def _open_expert(
    family: Family,
    backbone: Shapes,
    base: MatchedCheckpoint,
    place: Located,
    *,
    opened: Checkpoint | None,
    base_source: ModelSource,
    token_rows: TokenRows,
    read_weights: bool,
    auto_class: str | None,
) -> Expert:
    """Opens a whole fine-tuned model, unless it is opened already, or a LoRA adapter."""
    is_any, has_classes = isinstance(family, AnyModel), _has_heads(family)
    unused = family.ignored_in_experts
    if has_classes:
        unused = (*unused, *family.head_form(auto_class).ignored)

    def head(config: PretrainedConfig) -> Shapes:
        if not has_classes:
            return {}
        network = family.build_head(config, problem_of(auto_class, config))
        return {name: leaf.shape for name, leaf in network.shapes.items()}

    role, source = place.role, place.source
    if is_adapter(place.folder):
        if isinstance(base.checkpoint, Pipeline):
            raise InputError(
                f"{role} ({source.path}) is a PEFT adapter, which is not read for a diffusion "
                "pipeline; merge it into its model, and give the pipeline that was saved then"
            )
        adapter = open_adapter(
            source.path,
            place.folder,
            base,
            role=role,
            head=None if is_any else head,
            prefixes=family.prefixes,
            ignored=family.ignored(base.checkpoint.config),
            unused=unused,
            renamed=family.renamed,
            tied=family.tied(base.checkpoint.config) if read_weights else (),
            fit=token_rows.fit_adapter,
        )
        _warn_of_other_base(adapter, base_source)
        missing = [name for name in head(adapter.checkpoint.config) if name not in adapter.names]
        if missing and family.head is family.head_with_rest:
            raise InputError(
                f"{role} ({source.path}) lacks {missing[0]}, a part of its head where experts of "
                "words are beside it, as these have none; merge it into its model with PEFT's "
                "merge_and_unload() and give that, or learn them in recipes of their own"
            )
        if missing:
            raise InputError(
                f"{role} ({source.path}) lacks {missing[0]}: an adapter for classification must "
                "bring its head; train it with modules_to_save"
            )
        if has_classes:
            _require_classes(adapter.checkpoint, role, auto_class)
        return adapter
    with place.opening():
        expert = opened or open_in_folder(place.path, place.folder)
    if isinstance(base.checkpoint, Pipeline) or isinstance(expert, Pipeline):
        require_same_pipeline(base.checkpoint, expert, role=role)
    elif isinstance(expert, GgufCheckpoint):
        require_same_sizes(base.checkpoint, expert, role=role)
    else:
        require_same_architecture(base.checkpoint, expert, role=role)
    if has_classes:
        _require_classes(expert, role, auto_class)
    of_head = head_shapes(expert) if is_any else head(expert.config)
    # A part that other heads do not use may be one of this head.
    unused = tuple(pattern for pattern in unused if not any(matches(n, [pattern]) for n in of_head))
    return match(
        expert,
        backbone | of_head,
        role=role,
        prefixes=family.prefixes,
        optional=family.base_only,
        ignored=(*family.ignored(expert.config), *unused),
        second_names=family.second_names(expert.config),
        fit=token_rows.fit_model,
    )


def _require_classes(expert: Checkpoint, role: str, auto_class: str | None) -> None:
    """Refuses an expert of classes with a single one."""
    config = expert.config
    problem = problem_of(auto_class, config)
    if config.num_labels < 1 or (problem in (CLASSES, WORDS) and config.num_labels < 2):
        raise InputError(
            f"{role} ({expert.source}) has num_labels {config.num_labels} and "
            f"gives {problem.predicts}; an expert must give one of two or more classes, or "
            'numbers ("problem_type": "regression" in its config.json): leave it out'
        )


@contextmanager
def _of_base(source: ModelSource, base: Checkpoint) -> Iterator[None]:
    """Adds to error messages that it is the base whose architecture is at fault."""
    with in_hand(source.path):
        try:
            yield
        except InputError as error:
            raise InputError(f"base ({base.source}): {error}") from error
