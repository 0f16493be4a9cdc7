"""Writing where a mask is true, by the places that `torch.where` finds of it."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import torch


class TrueEntries:
    """The places of a mask's true entries, whose number is not known while JAX compiles.

    A tensor can be written at them. Whoever counts or reads them gets JAX's error.
    """

    def __init__(self, mask: jax.Array):
        """Keeps the mask."""
        self.mask = mask

    def __iter__(self) -> Iterator[jax.Array]:
        return iter(jnp.nonzero(self.mask))

    def __len__(self) -> int:
        return len(jnp.nonzero(self.mask))

    def __getitem__(self, place: int) -> jax.Array:
        return jnp.nonzero(self.mask)[place]


def write_true_entries(environment: Any) -> None:
    """Has tensors of torchax written at the places of a mask that is not known yet."""
    from torchax.tensor import Tensor

    dispatch, write = environment.dispatch, Tensor.__setitem__

    def dispatch_search(function: Any, types: Any, arguments: Any, options: Any = None) -> Any:
        if function is torch.where and len(arguments) == 1 and not options:
            mask = environment.t2j_iso(arguments[0])
            if isinstance(mask, jax.core.Tracer):
                return TrueEntries(mask)
        return dispatch(function, types, arguments, options)

    def write_at(tensor: Any, key: Any, value: Any) -> None:
        if isinstance(key, TrueEntries):
            key = Tensor(key.mask.astype(bool), environment)
        write(tensor, key, value)

    environment.dispatch = dispatch_search
    Tensor.__setitem__ = write_at
