"""A fingerprint of weights, computed from a sample of them."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from math import prod

import numpy as np
from jaxtyping import Array

from adamerge_jax.checkpoints.safetensors_file import TensorInfo, open_weights, read_entries

_SAMPLED_VALUES = 64
"""Values of a tensor's first row, and of its last one, that enter the fingerprint."""


def fingerprint(tensors: Mapping[str, TensorInfo], also: str = "") -> str:
    """Returns a fingerprint that tells a checkpoint from other fine-tunes of its architecture.

    It covers the name, dtype and shape of every tensor, and a sample of its values: the first 64 of
    its first row and the last 64 of its last one. So it takes two small reads for each tensor, not
    a pass over gigabytes. It does not depend on how the tensors are spread over files.

    It does not see changes outside the sample, such as weights edited by hand, or training of
    nothing but some rows of the embeddings. It sees fine-tuning of whole matrices as soon as one
    sampled value of one tensor moved by more than rounding. Of a tensor in parts it sees the first.
    The config, the tokenizer and all other files beside the weights have no influence.

    Of tensors that are stored in another form than plain numbers it is that of what is stored.

    Args:
        tensors: The tensors by name.
        also: Anything else that decides the meaning of the tensors.

    Returns:
        `sha256:` and 64 hexadecimal digits.
    """
    digest = hashlib.sha256(also.encode())
    tensors = {
        name + ending: part
        for name, info in tensors.items()
        for ending, part in info.stored.items()
    }
    with ExitStack() as stack:
        streams = {
            file: stack.enter_context(open_weights(file))
            for file in sorted({info.file for info in tensors.values()})
        }
        for name, info in sorted(tensors.items()):
            digest.update(json.dumps([name, info.dtype.name, info.shape]).encode())
            for sample in _samples(info.shape):
                values = np.empty(len(sample), info.dtype)
                read_entries(streams[info.file], name, info, sample.start, values)
                digest.update(values.tobytes())
    return f"sha256:{digest.hexdigest()}"


def fingerprint_of_arrays(arrays: Mapping[str, Array | np.ndarray]) -> str:
    """Returns a fingerprint of arrays in memory, as `fingerprint` does of those in files.

    Args:
        arrays: The arrays by name.

    Returns:
        `sha256:` and 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        for sample in _samples(array.shape):
            digest.update(np.asarray(_flat_part(array, sample)).tobytes())
    return f"sha256:{digest.hexdigest()}"


def _flat_part(array: Array | np.ndarray, sample: range) -> Array | np.ndarray:
    """Returns some entries of the first or the last row of a flattened array."""
    if not array.shape:
        return array
    is_first = sample.start == 0
    row = array[(0 if is_first else -1,) * (array.ndim - 1)]
    return row[: len(sample)] if is_first else row[-len(sample) :]


def _samples(shape: tuple[int, ...]) -> tuple[range, ...]:
    """Returns the sampled entries of a flattened tensor: of its first row and of its last one."""
    if not shape:
        return (range(1),)
    size, length = prod(shape), min(shape[-1], _SAMPLED_VALUES)
    return (range(length), range(size - length, size)) if size else ()
