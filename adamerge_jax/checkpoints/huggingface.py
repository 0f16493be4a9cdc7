"""Reading a Hugging Face checkpoint: its config, and its weights one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import RawIOBase
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from adamerge_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DOWNLOADED = (
    *("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken"),
    "README.md",  # says under which licence
)
_PICKLED = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt")
# What a trainer leaves next to the weights; finding one does not make a pickled checkpoint.
_TRAINER_FILES = ("training_args.bin", "optimizer.pt", "scheduler.pt")

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

STORED_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""NumPy dtypes by their names in a safetensors file."""

_AGAIN = "copy or download it again"

# Values of a tensor's first row, and of its last, that enter a checkpoint's identity.
_SAMPLED_VALUES = 64


@dataclass(frozen=True)
class TensorInfo:
    """What the header of a safetensors file says about one tensor.

    Attributes:
        shape: Of the tensor.
        dtype: That it is stored in.
        file: Where it is.
        start: The byte of the file at which its values begin.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    start: int


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A Hugging Face checkpoint, opened for reading tensor by tensor.

    Opening reads the config and the headers of the weight files; a weight is read when asked for.

    Attributes:
        source: What was opened, as the user wrote it: a folder or a Hub name.
        folder: Where its files are on this machine.
        config: The model's configuration.
        tensors: Shape, dtype and file of every tensor, by its name in the file.
    """

    source: str
    folder: Path
    config: PretrainedConfig = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)

    @classmethod
    def open(cls, source: str | Path, *, revision: str | None = None) -> Checkpoint:
        """Opens a local folder, or a checkpoint of the Hugging Face Hub.

        Args:
            source: As for `locate`.
            revision: A branch, tag or commit of a Hub checkpoint.

        Raises:
            InputError: There is no such checkpoint, or it is incomplete, corrupt or pickled.
        """
        return cls.in_folder(str(source), locate(source, revision=revision))

    @classmethod
    def in_folder(cls, source: str, folder: Path) -> Checkpoint:
        """Opens what `locate` found.

        Args:
            source: What was looked for, as the user wrote it.
            folder: Where its files are.

        Raises:
            InputError: It is incomplete, corrupt or pickled.
        """
        return cls(source, folder, _read_config(folder), _read_headers(folder))

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor, in the dtype that it is stored in.

        Raises:
            InputError: The file is gone, or was cut off after it was opened.
        """
        info = self.tensors[name]
        values = np.empty(info.shape, info.dtype)
        self.read_part(name, 0, values.reshape(-1))
        return values

    def read_part(self, name: str, first: int, out: Shaped[np.ndarray, " N"]) -> None:
        """Reads the entries `first : first + N` of a flattened tensor.

        It may be called from several threads at once. Nothing is mapped into memory, so `out` is
        all the memory that it takes.

        Args:
            name: Of the tensor, in the file.
            first: The first of the entries.
            out: Where they go, without gaps, in the dtype that the tensor is stored in.

        Raises:
            InputError: The file is gone, or was cut off after it was opened.
        """
        info = self.tensors[name]
        with _readable(info.file) as stream:
            _read_values(stream, name, info, first, out)

    def identity(self, also: str = "") -> str:
        """A fingerprint that tells this checkpoint from any other fine-tune of its architecture.

        It covers what the headers say of every tensor, its name, dtype and shape, and of its
        values a sample: the first 64 of its first row and the last 64 of its last one. So it takes
        two small reads for each tensor, not a pass over gigabytes. How the tensors are spread over
        files does not matter.

        What it does not see: a change that leaves the sample of every tensor as it is, such as
        weights edited by hand, or training of nothing but some rows of the embeddings. Fine-tuning
        of whole matrices is seen as soon as one sampled value of one tensor moved by more than
        rounding. Nor does it see the config, the tokenizer, or anything else beside the weights.

        Args:
            also: What else decides what the tensors mean.

        Returns:
            `sha256:` and 64 hexadecimal digits.
        """
        digest = hashlib.sha256(also.encode())
        with ExitStack() as stack:
            streams = {
                file: stack.enter_context(_readable(file))
                for file in sorted({info.file for info in self.tensors.values()})
            }
            for name, info in sorted(self.tensors.items()):
                header = json.dumps([name, info.dtype.name, info.shape])
                digest.update(header.encode())
                for sample in _samples(info.shape):
                    values = np.empty(len(sample), info.dtype)
                    _read_values(streams[info.file], name, info, sample.start, values)
                    digest.update(values.tobytes())
        return f"sha256:{digest.hexdigest()}"


def locate(source: str | Path, *, revision: str | None = None) -> Path:
    """The folder that holds a checkpoint or an adapter, downloaded where it is on the Hub.

    What exists as a folder is that folder; otherwise `name` and `org/name` are Hub names. The
    Hub client's own conventions hold: its cache, `HF_TOKEN`, `HF_HUB_OFFLINE`.

    Args:
        source: A folder, or a Hub name such as `google-bert/bert-base-uncased`.
        revision: A branch, tag or commit of what is on the Hub.

    Raises:
        InputError: There is no such thing.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise InputError(
                f"{source} is a local folder, so it has no revision {revision!r}; leave the "
                "revision out, or name a checkpoint of the Hub"
            )
        return folder
    if folder.exists():
        raise InputError(f"{source} is a file; give the folder that the checkpoint is in")
    if isinstance(source, Path) or not _HUB_NAME.fullmatch(source):
        raise InputError(
            f"no such folder: {source}; give the folder of a checkpoint, or a Hub name such as "
            "org/name"
        )
    return _download(source, revision)


def require_finite(array: np.ndarray, *, tensor: str, checkpoint: Checkpoint, role: str) -> None:
    """Refuses a tensor with NaN or infinite values: it would spoil the whole merge.

    Args:
        array: The tensor's values.
        tensor: Its name, for the message.
        checkpoint: Where it was read from, for the message.
        role: What the checkpoint is, for the message: `base`, `expert 'trec'`.

    Raises:
        InputError: With how many values are NaN or infinite, and where the first one is.
    """
    if _all_finite(array):
        return
    finite = np.isfinite(array)
    not_a_number = int(np.isnan(array).sum())
    infinite = int(array.size - finite.sum()) - not_a_number
    counts = [f"{not_a_number} NaN"] * (not_a_number > 0) + [f"{infinite} Inf"] * (infinite > 0)
    first = [int(index) for index in np.unravel_index(np.argmin(finite), array.shape)]
    raise InputError(
        f"{role} ({checkpoint.source}): {tensor} holds {' and '.join(counts)} among its "
        f"{array.size} values, the first at {first}; its training has probably diverged: use an "
        "earlier checkpoint of it, or leave it out"
    )


def in_one_line(error: BaseException) -> str:
    """What another library has to say about an error, as part of a one-line message."""
    return textwrap.shorten(str(error), width=240, placeholder=" ...") or type(error).__name__


def _download(name: str, revision: str | None) -> Path:
    """Fetches the files of a Hub checkpoint that are needed, and no pickled ones."""
    at_revision = f" at revision {revision!r}" if revision else ""
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(_DOWNLOADED),
            # Subfolders hold other formats of the same weights (onnx/, openvino/, ...).
            ignore_patterns=["*/*"],
        )
    except GatedRepoError as error:
        raise InputError(
            f"{name} is gated on the Hugging Face Hub: accept its terms at "
            f"https://huggingface.co/{name} and set HF_TOKEN to a token that may read it"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{name} is neither a local folder nor a checkpoint on the Hugging Face Hub; check "
            "the name, and set HF_TOKEN if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"{name} on the Hugging Face Hub has no revision {revision!r}; give one of its "
            "branches, tags or commits"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub is unreachable"
        raise InputError(
            f"{name}{at_revision} is neither a local folder nor in the Hub's cache "
            f"({constants.HF_HUB_CACHE}), and {reason}; download it while online, or give a folder"
        ) from error
    # The client also lets through whatever its transport, the disk and its own checks raise.
    except Exception as error:
        raise InputError(
            f"cannot download {name}{at_revision} from the Hugging Face Hub: {in_one_line(error)}"
        ) from error
    return Path(folder)


def _read_config(folder: Path) -> PretrainedConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(
            f"{folder} has no config.json; give the folder that `save_pretrained` wrote"
        )
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # A config's own validation raises errors of many types.
    except Exception as error:
        raise InputError(
            f"{file} is not a configuration that transformers knows: {in_one_line(error)}"
        ) from error


def _read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Finds the weight files of a checkpoint and lists their tensors."""
    # In this order, like transformers: a folder that has both loads the single file.
    if (folder / WEIGHTS_FILE).is_file():
        return read_header(folder / WEIGHTS_FILE)
    if (folder / INDEX_FILE).is_file():
        return _read_indexed_headers(folder / INDEX_FILE)
    for pattern in _PICKLED:
        for file in sorted(folder.glob(pattern)):
            if file.name not in _TRAINER_FILES:
                raise InputError(
                    f"{folder} has only pickled weights ({file.name}), which are never opened "
                    "because unpickling can run any code; load it with transformers once and "
                    "write it as safetensors with model.save_pretrained(folder)"
                )
    raise InputError(
        f"{folder} has no safetensors weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}; give a "
        "folder that `save_pretrained` wrote"
    )


def _read_indexed_headers(index_file: Path) -> dict[str, TensorInfo]:
    weight_map = _read_weight_map(index_file)
    shards: dict[str, dict[str, TensorInfo]] = {}
    for shard in sorted(set(weight_map.values())):
        # The name is judged, not what it resolves to: in the Hub's cache every file is a link to
        # a blob outside of the folder.
        if Path(shard).name != shard or shard == ".." or "\\" in shard:
            raise InputError(
                f"{index_file} names {shard!r}, which is not a file in its own folder; do not use "
                "this checkpoint unless you know why"
            )
        if not (index_file.parent / shard).is_file():
            raise InputError(
                f"{index_file} names {shard}, which is missing; copy or download it again"
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
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{index_file} is not JSON: {in_one_line(error)}; copy or download it again"
        ) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
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


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Lists the tensors of a safetensors file.

    Raises:
        InputError: The file is damaged, or holds a dtype that cannot be read.
    """
    with _opened(file) as tensors:
        names = list(tensors.keys())
    # What safetensors has found to be whole; it does not say where in the file values begin.
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        headers = json.loads(stream.read(length))
    unknown = [name for name in names if headers[name]["dtype"] not in STORED_DTYPES]
    if unknown:
        raise InputError(
            f"{file}: {unknown[0]} is stored as {headers[unknown[0]]['dtype']}"
            f"{and_more(len(unknown) - 1)}, which cannot be read; save the model in float32, "
            "float16 or bfloat16"
        )
    return {
        name: TensorInfo(
            tuple(headers[name]["shape"]),
            np.dtype(STORED_DTYPES[headers[name]["dtype"]]),
            file,
            8 + length + headers[name]["data_offsets"][0],
        )
        for name in names
    }


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Opens a safetensors file; what is wrong with it becomes an InputError."""
    try:
        tensors = safe_open(file, framework="np")
    except SafetensorError as error:
        raise InputError(f"{file} {_why_unreadable(file, error)}") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {in_one_line(error)}") from error
    with tensors:
        yield tensors


def _why_unreadable(file: Path, error: SafetensorError) -> str:
    """Says what is wrong with a file that safetensors refused: cut off, a pointer, or corrupt."""
    # The format: 8 bytes with the length of the header, the header as JSON, the values.
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            return "is a Git LFS pointer, not the weights; run `git lfs pull` in its repository"
        values_start = 8 + int.from_bytes(start, "little")
        header = stream.read(values_start - 8) if values_start <= size else b""
    if not header:
        return (
            f"has {size} bytes and ends within its header: it is cut off, or no safetensors "
            "file; copy or download it again"
        )
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name[:2] != "__"]
        expected = values_start + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        expected = size
    if size != expected:
        return f"has {size} bytes where its header describes {expected}; copy or download it again"
    return f"is corrupt ({in_one_line(error)}); copy or download it again"


def _all_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite."""
    if array.dtype not in (np.float16, ml_dtypes.bfloat16) or not array.size:
        return bool(np.isfinite(array).all())
    # As bits, finite magnitudes are those below infinity's: many times as fast in 16 bits.
    infinity = np.array(np.inf, array.dtype).view(np.uint16)
    return bool((array.view(np.uint16) & np.uint16(0x7FFF)).max() < infinity)


@contextmanager
def _readable(file: Path) -> Iterator[RawIOBase]:
    """Opens a file for reads that take what they ask for and, unlike a map, little around it."""
    try:
        with file.open("rb", buffering=0) as stream:
            yield stream
    except OSError as error:
        raise InputError(f"{file} cannot be read: {in_one_line(error)}") from error


def _read_values(
    stream: RawIOBase, name: str, info: TensorInfo, first: int, out: Shaped[np.ndarray, " N"]
) -> None:
    """Reads the entries `first : first + N` of a tensor from the file that it is in."""
    stream.seek(info.start + first * info.dtype.itemsize)
    left = memoryview(out.view(np.uint8))
    while left:
        count = stream.readinto(left)
        if not count:
            raise InputError(f"{info.file} ends within {name}; {_AGAIN}")
        left = left[count:]


def _samples(shape: tuple[int, ...]) -> tuple[range, ...]:
    """The entries, of a flattened tensor, that its first row begins and its last one ends with."""
    if not shape:
        return (range(1),)
    size, length = prod(shape), min(shape[-1], _SAMPLED_VALUES)
    return (range(length), range(size - length, size)) if size else ()


def and_more(count: int) -> str:
    """The rest of a list of which a message names only the first."""
    return f" (and {count} more)" if count else ""
