"""Tensors that are parts of others, or are made of several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
from jaxtyping import Shaped

from adamerge_jax.checkpoints.safetensors_file import TensorInfo


@dataclass(frozen=True)
class PartOfTensor(TensorInfo):
    """A part of a tensor whose entries do not lie one after the other in a file.

    Attributes:
        whole: The tensor.
        first: The entry of it, flattened, at which the part begins.
    """

    whole: TensorInfo
    first: int

    @property
    def merged_dtype(self) -> np.dtype:
        """The dtype of a merge: that of the whole tensor."""
        return self.whole.merged_dtype

    @property
    def stored(self) -> Mapping[str, TensorInfo]:
        """The part of that which lies entry by entry, and the whole of all else, such as scales."""
        return {
            ending: stored.part(self.first, self.shape)
            if stored.shape == self.whole.shape
            else stored
            for ending, stored in self.whole.stored.items()
        }

    def read(self, name: str, first: int, out: Shaped[np.ndarray, " N"]) -> None:
        """Reads entries; see `TensorInfo.read`."""
        self.whole.read(name, self.first + first, out)

    def part(self, first: int, shape: tuple[int, ...]) -> TensorInfo:
        """Returns a part of the part; see `TensorInfo.part`."""
        return self.whole.part(self.first + first, shape)


@dataclass(frozen=True)
class JoinedTensor(TensorInfo):
    """A tensor made of several, one after the other along its first axis.

    Attributes:
        pieces: These tensors, whose dtypes `dtype` has room for.
    """

    pieces: tuple[TensorInfo, ...]

    @property
    def stored(self) -> Mapping[str, TensorInfo]:
        """The plain numbers of the first piece."""
        return self.pieces[0].stored

    def read(self, name: str, first: int, out: Shaped[np.ndarray, " N"]) -> None:
        """Reads entries; see `TensorInfo.read`."""
        for piece in self.pieces:
            size = prod(piece.shape)
            here = out[: max(0, size - first)]
            if here.size:
                values = here if piece.dtype == out.dtype else np.empty(here.shape, piece.dtype)
                piece.read(name, first, values)
                here[...] = values
            first, out = max(0, first - size), out[here.size :]

    def part(self, first: int, shape: tuple[int, ...]) -> TensorInfo:
        """Returns a part of the tensor; see `TensorInfo.part`."""
        return PartOfTensor(shape, self.dtype, self.file, self.start, self, first)
