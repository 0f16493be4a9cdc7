"""Reading a Hugging Face checkpoint: its config, and its weights one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Shaped

from adamerge_jax.checkpoints.config_file import Fields, config_of, read_config_file
from adamerge_jax.checkpoints.fingerprint import fingerprint
from adamerge_jax.checkpoints.fused_experts import with_experts_apart
from adamerge_jax.checkpoints.hub import locate
from adamerge_jax.checkpoints.safetensors_file import TensorInfo, read_header
from adamerge_jax.checkpoints.scaled import restored_in_words, with_scales
from adamerge_jax.errors import InputError, and_more
from adamerge_jax.files.json_object import read_object

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_PICKLED = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt")
# Files that a trainer leaves beside the weights; they do not make a pickled checkpoint.
_TRAINER_FILES = ("training_args.bin", "optimizer.pt", "scheduler.pt")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A Hugging Face checkpoint, opened for reading tensor by tensor.

    Opening reads the config and the headers of the weight files; each weight is read on demand.

    Attributes:
        source: The folder or Hub name, as the user wrote it.
        folder: The folder of its files on this machine.
        config: The model's configuration.
        config_fields: The fields of its config.json, as they stand there.
        tensors: Shape, dtype and file of every tensor, by its name in the file.
        notes: Sentences on tensors that are not read as they lie in the files.
    """

    source: str
    folder: Path
    config: PretrainedConfig = field(repr=False)
    config_fields: Fields = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, source: str | Path, *, revision: str | None = None) -> Checkpoint:
        """Opens a local folder, or a checkpoint of the Hugging Face Hub.

        Args:
            source: A folder or a Hub name, as for `locate`.
            revision: A branch, tag or commit of a Hub checkpoint.

        Raises:
            InputError: There is no such checkpoint, or it is incomplete, corrupt or pickled.
        """
        return cls.in_folder(str(source), locate(source, revision=revision))

    @classmethod
    def in_folder(cls, source: str, folder: Path) -> Checkpoint:
        """Opens a checkpoint in a folder that `locate` returned.

        Args:
            source: The folder or Hub name, as the user wrote it.
            folder: The folder of its files.

        Raises:
            InputError: It is incomplete, corrupt or pickled.
        """
        fields = read_config_file(folder)
        in_files = _read_headers(folder)
        config = config_of(folder, fields, in_files)
        restored, scaled = with_scales(in_files, fields, str(folder))
        tensors, stacks = with_experts_apart(config.model_type, restored)
        notes = []
        if scaled:
            notes.append(restored_in_words(scaled))
        if stacks:
            notes.append(f"experts of its mixtures are read one by one from {stacks} stacks")
        return cls(source, folder, config, fields, tensors, tuple(notes))

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor, in the dtype that it is read in.

        Raises:
            InputError: The file is gone, or was cut off after it was opened.
        """
        info = self.tensors[name]
        values = np.empty(info.shape, info.dtype)
        self.read_part(name, 0, values.reshape(-1))
        return values

    def read_part(self, name: str, first: int, out: Shaped[np.ndarray, " N"]) -> None:
        """Reads the entries `first : first + N` of a flattened tensor.

        Several threads may call it at once. It takes no memory but `out`.

        Args:
            name: The tensor's name in the file.
            first: The first of the entries.
            out: The array to fill, without gaps, in the dtype that the tensor is read in.

        Raises:
            InputError: The file is gone, or was cut off after it was opened.
        """
        self.tensors[name].read(name, first, out)

    def identity(self, also: str = "") -> str:
        """Returns the `fingerprint` of its weights.

        Args:
            also: Anything else that decides the meaning of the tensors.
        """
        return fingerprint(self.tensors, also)


def _read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Finds the weight files of a checkpoint and returns their tensors by name."""
    # In this order, like transformers: of a folder that has both, the single file is loaded.
    if (folder / WEIGHTS_FILE).is_file():
        return read_header(folder / WEIGHTS_FILE)
    if (folder / INDEX_FILE).is_file():
        return read_indexed_headers(folder / INDEX_FILE)
    refuse_pickled(folder)
    raise InputError(
        f"{folder} has no safetensors weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}; give a "
        "folder that `save_pretrained` wrote"
    )


def refuse_pickled(folder: Path) -> None:
    """Refuses a folder with pickled weights.

    Raises:
        InputError: With the first such file.
    """
    for pattern in _PICKLED:
        for file in sorted(folder.glob(pattern)):
            if file.name not in _TRAINER_FILES:
                raise InputError(
                    f"{folder} has only pickled weights ({file.name}), which are never opened "
                    "because unpickling can run any code; load it with transformers once and "
                    "write it as safetensors with model.save_pretrained(folder)"
                )


def read_indexed_headers(index_file: Path) -> dict[str, TensorInfo]:
    """Returns the tensors of all shards that an index names, by name.

    Raises:
        InputError: The index or a shard is missing or damaged, or names a file elsewhere.
    """
    weight_map = _read_weight_map(index_file)
    shards: dict[str, dict[str, TensorInfo]] = {}
    for shard in sorted(set(weight_map.values())):
        # The name is checked, not the file that it resolves to: in the Hub's cache every file is a
        # link to a blob outside of the folder.
        if Path(shard).name != shard or shard == ".." or "\\" in shard:
            raise InputError(
                f"{index_file} names {shard[:80]!r}, which is not a file in its own folder; do not "
                "use this checkpoint unless you know why"
            )
        try:
            is_file = (index_file.parent / shard).is_file()
        except OSError:  # no file has such a name
            is_file = False
        if not is_file:
            raise InputError(
                f"{index_file} names {shard[:80]!r}, which is missing; copy or download it again"
            )
        shards[shard] = read_header(index_file.parent / shard)
    lacking = [name for name, shard in weight_map.items() if name not in shards[shard]]
    if lacking:
        raise InputError(
            f"{index_file.parent / weight_map[lacking[0]]} lacks {lacking[0]}, which "
            f"{index_file.name} says it holds{and_more(len(lacking) - 1)}; copy or download the "
            "checkpoint again"
        )
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _read_weight_map(index_file: Path) -> dict[str, str]:
    index = read_object(index_file)
    weight_map = index.get("weight_map")
    if not (
        isinstance(weight_map, dict)
        and weight_map
        and all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise InputError(
            f"{index_file} has no weight_map from tensor names to file names; copy or download it "
            "again"
        )
    return weight_map
