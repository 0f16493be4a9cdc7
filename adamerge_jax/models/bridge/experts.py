"""Mixtures of experts that loop over the experts with tokens, run over all experts and tokens."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax.numpy as jnp
import torch
from jaxtyping import Array, Bool, Int

_ARE_PADDED = ContextVar("indices_are_padded", default=False)


def loops_over_experts(module: torch.nn.Module) -> bool:
    """Returns True for experts whose forward looks for those with tokens, and adds up by index."""
    if not type(module).__name__.endswith("Experts"):
        return False
    code = inspect.getsource(inspect.unwrap(type(module).forward))
    return ".nonzero(" in code and ".index_add_(" in code


def over_all_experts(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the forward of such experts with as many indices as there can be.

    Which experts have tokens, and which tokens, is not known while a function is compiled. Each
    expert is asked with an index for every entry of its mask; those behind the entries that are
    true point past the end, where JAX reads the last row and adds nothing.
    """

    def run(*arguments: Any, **options: Any) -> Any:
        with _padded_indices():
            return forward(*arguments, **options)

    return run


@contextmanager
def _padded_indices() -> Iterator[None]:
    before = _ARE_PADDED.set(True)
    try:
        yield
    finally:
        _ARE_PADDED.reset(before)


def pad_indices(environment: Any) -> None:
    """Replaces, in an environment of torchax, the search for true entries inside such experts."""
    dispatch = environment.dispatch

    def dispatch_search(function: Any, types: Any, arguments: Any, options: Any = None) -> Any:
        if _ARE_PADDED.get():
            if function is torch.Tensor.nonzero:
                return torch.tensor([[expert] for expert in range(len(arguments[0]))])
            if function is torch.where and len(arguments) == 1:
                return environment.j2t_iso(_true_entries(environment.t2j_iso(arguments[0])))
        return dispatch(function, types, arguments, options)

    environment.dispatch = dispatch_search


def _true_entries(mask: Bool[Array, "..."]) -> tuple[Int[Array, " N"], ...]:
    return jnp.nonzero(mask, size=mask.size, fill_value=mask.shape)
