"""Writing a Hugging Face checkpoint: shard by shard, complete or not at all.

A merge of K experts with K heads is written once, as a backbone and K small heads:

    merged/
      config.json  model-00001-of-00002.safetensors  ...  model.safetensors.index.json
      tasks/trec/
        config.json  model.safetensors.index.json
        model-00001-of-00003.safetensors    the backbone's first shard (a hard link)
        model-00002-of-00003.safetensors    the backbone's second shard
        model-00003-of-00003.safetensors    the head of this task

Both the folder and each folder under `tasks/` are ordinary checkpoints for `from_pretrained`.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array

from adamerge_jax.checkpoints.assets import copy_assets, copy_generation_settings
from adamerge_jax.checkpoints.config_export import with_dtype
from adamerge_jax.checkpoints.config_file import CONFIG_FILE, Fields, fields_of
from adamerge_jax.checkpoints.folders import new_folder, readable_size, require_task_name
from adamerge_jax.checkpoints.huggingface import INDEX_FILE, Checkpoint
from adamerge_jax.checkpoints.safetensors_file import WeightFile, write_tensors
from adamerge_jax.checkpoints.sentence_modules import write_embedding_form
from adamerge_jax.checkpoints.shards import ShardWriter, shard_name
from adamerge_jax.errors import InputError
from adamerge_jax.files.json_object import write_json
from adamerge_jax.models.embedding_form import EmbeddingForm
from adamerge_jax.parameter_names import is_stacked, tensors_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class _TaskModel:
    config: Mapping[str, Any]
    head: Mapping[str, np.ndarray]
    assets: Checkpoint
    other_assets: Sequence[Checkpoint]


def save_model(
    folder: str | Path, config: PretrainedConfig, parameters: Mapping[str, Array]
) -> None:
    """Writes a whole model that `from_pretrained` reads.

    Args:
        folder: The folder to make.
        config: The model's config.
        parameters: Arrays by name, `[L, *shape]` where the name has a `*` for stacked layers.

    Raises:
        InputError: The folder is in use or cannot be made, or the disk is too full.
    """
    with write_checkpoint(folder) as writer:
        for name, array in parameters.items():
            values = np.asarray(array)
            rows = values if is_stacked(name) else [values]
            for tensor, row in zip(tensors_of(name, values.shape), rows, strict=True):
                writer.add(tensor, np.ascontiguousarray(row))
        writer.write_config(fields_of(config))


@contextmanager
def write_checkpoint(
    folder: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    expected_bytes: int | None = None,
) -> Iterator[CheckpointWriter]:
    """Writes a checkpoint that `from_pretrained` reads.

    The folder appears when the block ends; after an error or an interrupt there is none.

    Args:
        folder: The folder to make; it may exist if it is empty.
        max_shard_bytes: The size of a weight file, exceeded only by one with a single tensor.
        expected_bytes: The size of all files, to check first that the disk has room for it.

    Yields:
        A writer, to which tensors and all other parts are added.

    Raises:
        InputError: The folder is in use or cannot be made, or the disk is or becomes full.

    Example:
        with write_checkpoint("merged") as writer:
            for name, array in merged:
                writer.add(name, array)
            writer.write_config(base.config_fields)
            writer.copy_assets(base)
            writer.add_task_model("trec", config=trec.config_fields, head=head, assets=trec)
    """
    # The thread has ended when the folder is renamed or removed.
    with (
        new_folder(folder, expected_bytes=expected_bytes) as partial,
        ThreadPoolExecutor(1) as thread,
    ):
        writer = CheckpointWriter(folder, partial, ShardWriter(partial, max_shard_bytes, thread))
        yield writer
        writer.finish()


class CheckpointWriter:
    """The parts of a checkpoint that is being written; made by `write_checkpoint`."""

    def __init__(self, folder: str | Path, partial: Path, shards: ShardWriter) -> None:
        """Begins without any part.

        Args:
            folder: The folder that the checkpoint will be in, for messages.
            partial: The folder that it is written to.
            shards: The writer of its tensors.
        """
        self._folder = folder
        self._partial = partial
        self._shards = shards
        self._config: Fields | None = None
        self._task_models: dict[str, _TaskModel] = {}

    def add(self, name: str, array: np.ndarray | jax.Array) -> None:
        """Adds a tensor, in its own dtype. It must not change until the block has ended.

        Raises:
            OSError: An earlier shard could not be written; if the disk is full, the block makes an
                `InputError` of it.
        """
        self._shards.add(name, array)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Writes fields as config.json, with the dtype that the tensors turn out to have."""
        self._config = dict(config)

    def copy_assets(self, checkpoint: Checkpoint, otherwise: Sequence[Checkpoint] = ()) -> None:
        """Copies the tokenizer, processor and generation settings of a checkpoint.

        Args:
            checkpoint: The checkpoint whose files are copied.
            otherwise: Checkpoints to take the tokenizer or the processor from if it has none: the
                first one that has.
        """
        copy_assets(checkpoint, otherwise, self._partial)

    def copy_generation_settings(
        self, checkpoints: Sequence[Checkpoint], token_ids: Mapping[str, Any]
    ) -> None:
        """Copies generation settings with other special tokens.

        Args:
            checkpoints: The checkpoints to take them from: the first one that has any.
            token_ids: The ids of special tokens by their fields.
        """
        copy_generation_settings(checkpoints, token_ids, self._partial)

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file, such as a model card, beside the weights."""
        (self._partial / name).write_text(text, encoding="utf-8")

    def write_embedding_form(self, form: EmbeddingForm, features: int) -> None:
        """Writes the module files of a sentence embedder beside the weights.

        Args:
            form: The pooling, and all else around the model.
            features: H, the features of the model's tokens.
        """
        write_embedding_form(self._partial, form, features)

    def write_further_tensors(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a safetensors file of tensors that are no parameters of the model."""
        write_tensors(self._partial / name, dict(arrays))

    def add_task_model(
        self,
        task: str,
        *,
        config: Mapping[str, Any],
        head: Mapping[str, np.ndarray | jax.Array],
        assets: Checkpoint,
        otherwise: Sequence[Checkpoint] = (),
    ) -> None:
        """Adds the model of one task, in `tasks/<task>/`: the tensors of this writer and a head.

        Args:
            task: The name of its folder.
            config: The fields of its config.json.
            head: The tensors that only this task has, by name.
            assets: The checkpoint whose tokenizer and processor files are copied.
            otherwise: Further checkpoints to take them from, as for `copy_assets`.

        Raises:
            InputError: The task's name cannot be the name of a folder, or is there already.
        """
        require_task_name(task)
        if task in self._task_models:
            raise InputError(f"there are two tasks named {task!r}; rename one of them")
        self._task_models[task] = _TaskModel(
            dict(config),
            # In one order, whoever lists them, so that the same head has the same bytes.
            {name: np.asarray(head[name], order="C") for name in sorted(head)},
            assets,
            tuple(otherwise),
        )

    def finish(self) -> None:
        """Writes the last shard, the index, the config and the models of tasks."""
        files = self._shards.finish()
        if len(files) > 1:
            write_index(self._partial / INDEX_FILE, files)
        if self._config is not None:
            write_config(self._partial, self._config, files)
        for task, model in self._task_models.items():
            self._write_task_model(task, model, files)

    def _write_task_model(
        self, task: str, model: _TaskModel, backbone: Sequence[WeightFile]
    ) -> None:
        shared = sorted(self._shards.names & model.head.keys())
        if shared:
            raise ValueError(f"{shared[0]} is both a shared tensor and in the head of {task!r}")
        folder = self._partial / "tasks" / task
        folder.mkdir(parents=True)
        # Numbered even if there is one: transformers would take a model.safetensors for the whole
        # model and never look at the index.
        count = len(backbone) + bool(model.head)
        files = []
        copied_bytes = 0
        for number, shard in enumerate(backbone, start=1):
            file = folder / shard_name(number, count)
            if not _link_or_copy(shard.file, file):
                copied_bytes += shard.bytes
            files.append(WeightFile(file, shard.names, shard.values_of))
        if copied_bytes:
            logging.getLogger(__name__).warning(
                "the file system of %s refuses hard links: tasks/%s holds a copy of the shared "
                "weights (%s)",
                self._folder,
                task,
                readable_size(copied_bytes),
            )
        if model.head:
            files.append(write_tensors(folder / shard_name(count, count), dict(model.head)))
        write_index(folder / INDEX_FILE, files)
        write_config(folder, model.config, files)
        copy_assets(model.assets, model.other_assets, folder)


def model_class(config: PretrainedConfig, auto_class: str | None = None) -> str:
    """Returns the name of the `transformers` class for models of a config.

    Args:
        config: The model's config.
        auto_class: The class that chooses it by its head; None for the model without a head.
    """
    # As attributes of the package they ask for PyTorch.
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    class_names = {
        None: MODEL_MAPPING_NAMES,
        "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForImageTextToText": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "AutoModelForSeq2SeqLM": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForSequenceClassification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForMultipleChoice": MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
        "AutoModelForTokenClassification": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForImageClassification": MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    }
    found = class_names[auto_class][config.model_type]
    return found if isinstance(found, str) else found[0]  # a DeiT has several, the first is loaded


def headless_class(config: PretrainedConfig) -> str | None:
    """Returns the `transformers` class for models without a head; None where it has none."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    has_one = config.model_type in MODEL_MAPPING_NAMES
    return model_class(config) if has_one else None


def write_index(index_file: Path, files: Sequence[WeightFile]) -> None:
    """Writes the index that names the file of each tensor.

    Args:
        index_file: The file to make.
        files: The files beside it.
    """
    index = {
        "metadata": {"total_size": sum(file.bytes for file in files)},
        "weight_map": {name: file.file.name for file in files for name in sorted(file.names)},
    }
    write_json(index_file, index)


def write_config(folder: Path, fields: Mapping[str, Any], files: Sequence[WeightFile]) -> None:
    """Writes fields as config.json, with the dtype of the weights.

    Args:
        folder: The folder of the config.
        fields: The fields.
        files: The weight files.
    """
    values_of: Counter[np.dtype] = Counter()
    for file in files:
        values_of.update(file.values_of)
    if values_of:
        # The model's dtype is that of most values; a few tensors may have others.
        fields = with_dtype(fields, values_of.most_common(1)[0][0].name)
    write_json(folder / CONFIG_FILE, fields)


def _link_or_copy(source: Path, target: Path) -> bool:
    """Makes `target` the same file as `source`, or else a copy; returns False for a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        return False
    return True
