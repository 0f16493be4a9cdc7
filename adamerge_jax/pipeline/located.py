"""The experts of a recipe on this machine, before they are opened.

Their classes decide how the models are run, and their tokenizers what a base gets of tokens.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

from adamerge_jax.checkpoints.config_file import classes_of, read_config_file
from adamerge_jax.checkpoints.diffusion import Pipeline
from adamerge_jax.checkpoints.hub import locate
from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.opening import open_in_folder
from adamerge_jax.checkpoints.peft import is_adapter
from adamerge_jax.checkpoints.peft_config import TASK_TYPES, read_adapter_config
from adamerge_jax.checkpoints.peft_tensors import open_saved
from adamerge_jax.checkpoints.tokenizer_files import has_tokenizer, load_tokenizer
from adamerge_jax.checkpoints.vocabulary import with_rows_of
from adamerge_jax.data.tokenizers import padding_of
from adamerge_jax.errors import InputError, in_hand, in_one_line
from adamerge_jax.models.problem import auto_class_of
from adamerge_jax.recipes.schema import ModelSource


def resolve(path: str, root: Path) -> str:
    """Returns a recipe's path below its root; a path that does not exist stays a Hub id.

    Raises:
        InputError: The path can be no folder's, or is a folder of the current directory, which
            would be opened in place of the Hub's model: elsewhere the recipe would mean another.
    """
    try:
        if not path.isprintable():
            raise ValueError("it has characters that no line can show")
        local = root / Path(path).expanduser()
        exists, is_here = local.exists(), Path(path).is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, or of no user
        raise InputError(
            f"{path[:80]!r} cannot be a folder ({in_one_line(error)[:80]}); give the folder of a "
            "checkpoint, or a Hub name such as org/name"
        ) from error
    if exists:
        return str(local)
    if is_here:
        raise InputError(
            f"{path} is a folder of the current directory ({Path.cwd()}), where paths do not "
            "start; give its absolute path, or another root"
        )
    return path


@contextmanager
def opening(role: str, source: ModelSource, root: Path) -> Iterator[None]:
    """Adds to error messages the role of the model in hand and the root of relative paths."""
    with in_hand(source.path):
        try:
            yield
        except InputError as error:
            raise InputError(f"{role}: {error} (relative paths start at {root})") from error


class Located(NamedTuple):
    """An expert that is on this machine.

    Attributes:
        role: Its role, for messages.
        source: The recipe's words for it.
        root: Folder that relative paths start from.
        path: Its path below the root, or its Hub id.
        folder: Its folder, or its file.
    """

    role: str
    source: ModelSource
    root: Path
    path: str
    folder: Path

    def opening(self) -> AbstractContextManager[None]:
        """Returns the context in which its files are opened."""
        return opening(self.role, self.source, self.root)


def locate_expert(role: str, source: ModelSource, root: Path) -> Located:
    """Finds an expert's folder, which is downloaded where it is on the Hub."""
    with opening(role, source, root):
        path = resolve(source.path, root)
        return Located(role, source, root, path, locate(path, revision=source.revision))


def classes_of_expert(base: Checkpoint, expert: Located) -> list[str]:
    """Returns the classes that an expert's model is of.

    An adapter's is the one of its task type, if that has a head for its task. There is no such type
    for images: an adapter of a model without a head, which saved modules whole, is of a classifier
    where `transformers` has one. All others are of the base's classes.
    """
    if not expert.folder.is_dir():
        return classes_of(base.config_fields)
    if not is_adapter(expert.folder):
        with expert.opening():
            return classes_of(read_config_file(expert.folder))
    with in_hand(expert.source.path):
        fields = read_adapter_config(expert.folder, f"{expert.role} ({expert.path})")
    of_task = TASK_TYPES.get(str(fields.get("task_type")))
    if of_task is None and fields.get("modules_to_save") and _reads_images_alone(base):
        of_task = "AutoModelForImageClassification"
    return classes_of(base.config_fields) if of_task is None else [of_task]


def _reads_images_alone(base: Checkpoint) -> bool:
    """Returns True for a model of images without a head, to which a classifier's can be added."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    has_head = any("For" in name for name in classes_of(base.config_fields))
    return not has_head and base.config.model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES


def shared_architecture(classes: Iterable[Sequence[str]]) -> str | None:
    """Returns the class of the experts' models, by which a model without a family here is run.

    Of several kinds of heads it is one that gives classes of texts, if there is one.

    Args:
        classes: The classes of each expert's model.
    """
    with_first = min(classes, key=lambda names: auto_class_of(names) is not None)
    return next(iter(with_first), None)


def with_rows_of_tokenizer(
    base: Checkpoint, owner: Located | None
) -> tuple[Checkpoint, Mapping[int, str]]:
    """Adds to the base the rows of tokens that only the expert has whose tokenizer is chosen.

    Returns:
        The base, and the tokens of these rows by id.
    """
    if owner is None or isinstance(base, Pipeline):
        return base, {}
    with in_hand(owner.source.path):
        if is_adapter(owner.folder):
            checkpoint = open_saved(owner.path, owner.folder, base, role=owner.role)
        else:
            with owner.opening():
                checkpoint = open_in_folder(owner.path, owner.folder)
        return with_rows_of(base, checkpoint, owner.role)


def with_padding(
    base: Checkpoint, located: Mapping[str, Located], classes: Mapping[str, Sequence[str]]
) -> Checkpoint:
    """Gives a base for adapters that classify texts the token that pads, where it names none.

    A decoder classifies a text at its last token that is no padding. That token's id is part of
    the config that the adapter was trained with, which is not saved; the tokenizer beside it is.

    Args:
        base: The base.
        located: The experts by task.
        classes: The classes of their models, as `classes_of_expert` returns them.
    """
    if isinstance(base, Pipeline) or getattr(base.config, "pad_token_id", 0) is not None:
        return base
    for task, expert in located.items():
        if is_adapter(expert.folder) and TASK_TYPES["SEQ_CLS"] in classes[task]:
            beside = dataclasses.replace(base, folder=expert.folder)
            owner = beside if has_tokenizer(beside) else base
            if has_tokenizer(owner):
                config = copy.deepcopy(base.config)
                config.pad_token_id = padding_of(load_tokenizer(owner, expert.role))
                fields = {**base.config_fields, "pad_token_id": config.pad_token_id}
                return dataclasses.replace(base, config=config, config_fields=fields)
    return base
