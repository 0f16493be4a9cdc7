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

import copy
import json
import logging
import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array

from adamerge_jax.checkpoints.folders import new_folder, readable_size
from adamerge_jax.checkpoints.huggingface import (
    INDEX_FILE,
    STORED_DTYPES,
    WEIGHTS_FILE,
    Checkpoint,
)
from adamerge_jax.checkpoints.tokenizer_files import has_tokenizer
from adamerge_jax.errors import InputError
from adamerge_jax.parameter_names import is_stacked, tensors_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
)
_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
)
_GENERATION_FILES = ("generation_config.json",)

_NAMES_OF_DTYPES = {np.dtype(dtype): name for name, dtype in STORED_DTYPES.items()}

# Of the format, in bytes.
_HEADER_ALIGNMENT = 8

_TASK_NAME = re.compile(r"\w[\w.+-]*")


@dataclass(frozen=True)
class _Shard:
    """A weight file that has been written."""

    file: Path
    names: tuple[str, ...]
    values_of: Mapping[np.dtype, int]

    @property
    def bytes(self) -> int:
        return sum(dtype.itemsize * count for dtype, count in self.values_of.items())


@dataclass(frozen=True)
class _TaskModel:
    config: PretrainedConfig
    head: Mapping[str, np.ndarray]
    assets: Checkpoint
    otherwise: Sequence[Checkpoint]


def save_model(
    folder: str | Path, config: PretrainedConfig, parameters: Mapping[str, Array]
) -> None:
    """Writes a whole model that `from_pretrained` reads.

    Args:
        folder: The folder to make.
        config: Of the model.
        parameters: Arrays by name, `[L, *shape]` where the name has a `*` for stacked layers.

    Raises:
        InputError: The folder is in use or cannot be made, or the disk is too full.
    """
    with CheckpointWriter(folder) as writer:
        for name, array in parameters.items():
            values = np.asarray(array)
            rows = values if is_stacked(name) else [values]
            for tensor, row in zip(tensors_of(name, values.shape), rows, strict=True):
                writer.add(tensor, np.ascontiguousarray(row))
        writer.write_config(config)


class CheckpointWriter:
    """Writes a checkpoint that `from_pretrained` reads.

    Tensors are added one at a time. Once a shard is full, a thread writes it while the next one
    fills; what is not yet written is a shard at most, and `add` waits where it would be more. The
    folder appears when the block ends; after an error or an interrupt there is none.

    Example:
        with CheckpointWriter(Path("merged")) as writer:
            for name, array in merged:
                writer.add(name, array)
            writer.write_config(base.config)
            writer.copy_assets(base)
            writer.add_task_model("trec", config=trec.config, head=head, assets=trec)
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_shard_bytes: int = 5_000_000_000,
        expected_bytes: int | None = None,
    ) -> None:
        """Prepares to write; nothing is made until the block is entered.

        Args:
            folder: The folder to make; it may exist if it is empty.
            max_shard_bytes: The size that a weight file has at most, unless one tensor is larger.
            expected_bytes: How much will be written, to find out first whether it fits.
        """
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._expected_bytes = expected_bytes
        self._cleanup = ExitStack()
        self._partial: Path
        self._pending: dict[str, np.ndarray] = {}
        self._pending_bytes = 0
        self._leaving_bytes = 0
        self._room = threading.Condition()
        self._shards: list[Future[_Shard]] = []
        self._names: set[str] = set()
        self._config: PretrainedConfig | None = None
        self._task_models: dict[str, _TaskModel] = {}

    def __enter__(self) -> CheckpointWriter:
        """Makes the temporary folder.

        Raises:
            InputError: The folder is in use or cannot be made, or the disk is too full.
        """
        self._partial = self._cleanup.enter_context(
            new_folder(self._folder, expected_bytes=self._expected_bytes)
        )
        # Entered last, so that its thread has ended when the folder is renamed or removed.
        self._thread = self._cleanup.enter_context(ThreadPoolExecutor(1))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Completes the checkpoint and gives it its name, or removes what was written.

        Raises:
            InputError: The disk became full.
        """
        if error is not None:
            self._cleanup.__exit__(kind, error, traceback)
            return
        with self._cleanup:
            self._finish()

    def add(self, name: str, array: np.ndarray | jax.Array) -> None:
        """Adds a tensor, in its own dtype. It must not change until the block has ended.

        Raises:
            OSError: An earlier shard could not be written; the block makes an `InputError` of it
                where the disk is full.
        """
        if name in self._names:
            raise ValueError(f"{name} was added twice")
        self._names.add(name)
        # safetensors writes an array's buffer as it lies in memory, so it must lie in C order.
        # (np.ascontiguousarray would make a vector of a scalar.)
        array = np.asarray(array, order="C")
        if self._pending and self._pending_bytes + array.nbytes > self._max_shard_bytes:
            self._close_shard()
        self._wait_for_room(array.nbytes)
        self._pending[name] = array
        self._pending_bytes += array.nbytes

    def write_config(self, config: PretrainedConfig) -> None:
        """Writes `config` as config.json, with the dtype that the tensors turn out to have."""
        self._config = copy.deepcopy(config)

    def copy_assets(self, checkpoint: Checkpoint, otherwise: Sequence[Checkpoint] = ()) -> None:
        """Copies the tokenizer, processor and generation settings that a checkpoint has.

        Args:
            checkpoint: Whose files they are.
            otherwise: Where it has no tokenizer or no processor, that of the first of these that
                has one is copied.
        """
        _copy_assets(checkpoint, otherwise, self._partial)

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file, such as a model card, beside the weights."""
        (self._partial / name).write_text(text, encoding="utf-8")

    def add_task_model(
        self,
        task: str,
        *,
        config: PretrainedConfig,
        head: Mapping[str, np.ndarray | jax.Array],
        assets: Checkpoint,
        otherwise: Sequence[Checkpoint] = (),
    ) -> None:
        """Adds the model of one task, in `tasks/<task>/`: the tensors of this writer and a head.

        Args:
            task: The name of its folder.
            config: Its configuration.
            head: The tensors that only this task has, by name.
            assets: The checkpoint whose tokenizer and processor files it gets.
            otherwise: As for `copy_assets`.

        Raises:
            InputError: The task's name cannot be the name of a folder, or is there already.
        """
        require_task_name(task)
        if task in self._task_models:
            raise InputError(f"there are two tasks named {task!r}; rename one of them")
        self._task_models[task] = _TaskModel(
            copy.deepcopy(config),
            {name: np.asarray(array, order="C") for name, array in head.items()},
            assets,
            tuple(otherwise),
        )

    def _wait_for_room(self, size: int) -> None:
        """Waits until what is not yet written is a shard at most, `size` bytes more included."""
        with self._room:
            self._room.wait_for(
                lambda: (
                    not self._leaving_bytes
                    or self._leaving_bytes + self._pending_bytes + size <= self._max_shard_bytes
                )
            )
        for shard in self._shards:
            if shard.done():
                shard.result()

    def _close_shard(self) -> None:
        file = self._partial / f"shard-{len(self._shards)}.safetensors"
        with self._room:
            self._leaving_bytes += self._pending_bytes
        self._shards.append(self._thread.submit(self._write_pending, file, self._pending))
        self._pending = {}
        self._pending_bytes = 0

    def _write_pending(self, file: Path, tensors: dict[str, np.ndarray]) -> _Shard:
        """Writes a shard, in the thread, and forgets its tensors one by one."""
        left = sum(array.nbytes for array in tensors.values())

        def gone(size: int) -> None:
            nonlocal left
            left -= size
            with self._room:
                self._leaving_bytes -= size
                self._room.notify_all()

        try:
            return _write_shard(file, tensors, written=gone)
        finally:
            # After an error too, or `add` would wait forever.
            gone(left)

    def _finish(self) -> None:
        if self._pending:
            self._close_shard()
        shards = []
        count = len(self._shards)
        for number, shard in enumerate([each.result() for each in self._shards], start=1):
            name = WEIGHTS_FILE if count == 1 else _shard_name(number, count)
            file = shard.file.rename(self._partial / name)
            shards.append(_Shard(file, shard.names, shard.values_of))
        if len(shards) > 1:
            _write_index(self._partial, shards)
        if self._config is not None:
            _write_config(self._partial, self._config, shards)
        for task, model in self._task_models.items():
            self._write_task_model(task, model, shards)

    def _write_task_model(self, task: str, model: _TaskModel, backbone: Sequence[_Shard]) -> None:
        shared = sorted(self._names & model.head.keys())
        if shared:
            raise ValueError(f"{shared[0]} is both a shared tensor and in the head of {task!r}")
        folder = self._partial / "tasks" / task
        folder.mkdir(parents=True)
        count = len(backbone) + bool(model.head)
        # Numbered even if there is one: transformers would take a model.safetensors for the whole
        # model and never look at the index.
        files = [folder / _shard_name(number, count) for number in range(1, count + 1)]
        shards = [
            _Shard(file, shard.names, shard.values_of)
            for file, shard in zip(files, backbone, strict=False)
        ]
        copied = sum(
            shard.bytes
            for shard, file in zip(backbone, files, strict=False)
            if not _link_or_copy(shard.file, file)
        )
        if copied:
            logging.getLogger(__name__).warning(
                "the file system of %s refuses hard links: tasks/%s holds a copy of the shared "
                "weights (%s)",
                self._folder,
                task,
                readable_size(copied),
            )
        if model.head:
            shards.append(_write_shard(files[-1], dict(model.head)))
        _write_index(folder, shards)
        _write_config(folder, model.config, shards)
        _copy_assets(model.assets, model.otherwise, folder)


def model_class(config: PretrainedConfig, auto_class: str | None = None) -> str:
    """Returns the name of the `transformers` class for models of a config.

    Args:
        config: The model's config.
        auto_class: The class that chooses it, a classifier's; None for the model without a head.
    """
    from transformers.models.auto import modeling_auto

    class_names = {
        None: modeling_auto.MODEL_MAPPING_NAMES,
        "AutoModelForSequenceClassification": (
            modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        ),
        "AutoModelForImageClassification": (
            modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        ),
    }
    return class_names[auto_class][config.model_type]


def require_task_name(task: str) -> None:
    """Refuses a name that cannot be that of a folder under `tasks/`.

    Raises:
        InputError: It is empty, or has other characters than a folder's name should.
    """
    if not _TASK_NAME.fullmatch(task):
        raise InputError(
            f"task name {task!r} cannot be the name of a folder; use letters, digits and any "
            "of . _ + - after the first"
        )


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_shard(
    file: Path, tensors: dict[str, np.ndarray], written: Callable[[int], None] = lambda size: None
) -> _Shard:
    """Writes a safetensors file: the header's length, the header as JSON, the values.

    safetensors' own function copies all values before it writes them.

    Args:
        file: The file to make.
        tensors: By name, in C order; each is taken out when it has been written.
        written: Is told the bytes of each.
    """
    # Wide values first, so that all are aligned; there are no gaps in the format.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    # Some versions of transformers refuse a file that does not name a framework.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    values_of: Counter[np.dtype] = Counter()
    end = 0
    for name in names:
        array = tensors[name]
        values_of[array.dtype] += array.size
        header[name] = {
            "dtype": _NAMES_OF_DTYPES[array.dtype],
            "shape": array.shape,
            "data_offsets": (end, end := end + array.nbytes),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    with file.open("wb", buffering=0) as stream:
        _write_all(stream, len(text).to_bytes(8, "little") + text)
        for name in names:
            array = tensors.pop(name)
            _write_all(stream, array.reshape(-1).view(np.uint8))
            written(array.nbytes)
            del array
        # Here, so that the disk works while the next shard is made.
        os.fsync(stream.fileno())
    return _Shard(file, tuple(names), values_of)


def _write_all(stream: RawIOBase, data: bytes | np.ndarray) -> None:
    """Writes all of it: one call writes 2 GB at most."""
    left = memoryview(data)
    while left:
        left = left[stream.write(left) :]


def _write_index(folder: Path, shards: Sequence[_Shard]) -> None:
    index = {
        "metadata": {"total_size": sum(shard.bytes for shard in shards)},
        "weight_map": {name: shard.file.name for shard in shards for name in sorted(shard.names)},
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(folder: Path, config: PretrainedConfig, shards: Sequence[_Shard]) -> None:
    values_of: Counter[np.dtype] = Counter()
    for shard in shards:
        values_of.update(shard.values_of)
    config = copy.deepcopy(config)
    if values_of:
        # Where a few tensors have a dtype of their own, what most values have is the model's.
        dtype = values_of.most_common(1)[0][0].name
        for part in [config, *(getattr(config, name) for name in config.sub_configs)]:
            part.dtype = dtype
    config.to_json_file(folder / "config.json")


def _copy_assets(checkpoint: Checkpoint, otherwise: Sequence[Checkpoint], folder: Path) -> None:
    every = (checkpoint, *otherwise)
    with_tokenizer = next((each for each in every if has_tokenizer(each)), checkpoint)
    with_processor = next((each for each in every if _found(each, _PROCESSOR_FILES)), checkpoint)
    for file in (
        *_found(with_tokenizer, _TOKENIZER_FILES),
        *_found(with_processor, _PROCESSOR_FILES),
        *_found(checkpoint, _GENERATION_FILES),
    ):
        shutil.copyfile(file, folder / file.name)


def _found(checkpoint: Checkpoint, patterns: Sequence[str]) -> list[Path]:
    """The files of a checkpoint that one of some patterns fits."""
    return [
        file
        for pattern in patterns
        for file in sorted(checkpoint.folder.glob(pattern))
        if file.is_file()
    ]


def _link_or_copy(source: Path, target: Path) -> bool:
    """Makes `target` the same file as `source`, or a copy of it; whether it is the same file."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        return False
    return True
