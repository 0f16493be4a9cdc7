"""`torchax`, imported once: PyTorch's operations computed by JAX."""

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from adamerge_jax.errors import InputError

_GRADIENTS_STOP = ContextVar("gradients_stop", default=True)  # under torch.no_grad()


@functools.cache
def torch_in_jax() -> Any:
    """Returns the environment of `torchax`, in which PyTorch code runs as JAX.

    Raises:
        InputError: PyTorch or torchax is not installed.
    """
    missing = [name for name in ("torch", "torchax") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} are needed to run a model's own PyTorch forward and are not "
            "installed; pip install 'adamerge_jax[torch]'"
        )
    with _overloads_of_named_tensors():
        import torchax

        environment = torchax.default_env()
    from adamerge_jax.models.bridge.constants import take_in_constants
    from adamerge_jax.models.bridge.experts import pad_indices
    from adamerge_jax.models.bridge.operations import replace_operations
    from adamerge_jax.models.bridge.true_entries import write_true_entries

    torchax.tensor.Tensor.type_as = _type_as
    write_true_entries(environment)
    replace_operations(environment)
    pad_indices(environment)
    take_in_constants(environment)
    _stop_gradients(environment)
    return environment


def _type_as(tensor: Any, other: Any) -> Any:
    """Returns a tensor in the dtype of another; torchax changes it in place, and takes no views."""
    return tensor.to(other.dtype)


def _stop_gradients(environment: Any) -> None:
    """Lets no gradient through what a model computes under `torch.no_grad()`, or detaches.

    Some models do the first of their cycles so. JAX knows nothing of PyTorch's gradient mode.
    """
    import jax
    import torch
    from torch.utils import _pytree
    from torchax.tensor import Tensor

    dispatch = environment.dispatch
    detaches = (torch.Tensor.detach, torch.ops.aten.detach.default, torch.ops.aten.detach)

    def stopped(value: Any) -> Any:
        if not is_in_jax(value):
            return value
        return Tensor(jax.lax.stop_gradient(environment.t2j_iso(value)), environment)

    def dispatch_and_stop(function: Any, types: Any, arguments: Any, options: Any) -> Any:
        result = dispatch(function, types, arguments, options)
        has_no_gradient = _GRADIENTS_STOP.get() and not torch.is_grad_enabled()
        if not (has_no_gradient or function in detaches):
            return result
        if arguments and result is arguments[0]:  # in place
            return result
        return _pytree.tree_map_only(torch.Tensor, stopped, result)

    environment.dispatch = dispatch_and_stop


@contextmanager
def gradients_pass() -> Iterator[None]:
    """Lets gradients through code that `transformers` runs under `torch.no_grad()`."""
    before = _GRADIENTS_STOP.set(False)
    try:
        yield
    finally:
        _GRADIENTS_STOP.reset(before)


@contextmanager
def custom_functions_have_gradients() -> Iterator[None]:
    """Has JAX differentiate the forward of each `torch.autograd.Function`.

    PyTorch computes it without gradients, as the function comes with a backward of its own; that is
    not used.
    """
    import torch

    before = torch.autograd.Function.__dict__["apply"]

    def apply(function: Any, *arguments: Any, **options: Any) -> Any:
        run = before.__get__(None, function)
        if not torch.is_grad_enabled():
            return run(*arguments, **options)
        with gradients_pass():
            return run(*arguments, **options)

    torch.autograd.Function.apply = classmethod(apply)
    try:
        yield
    finally:
        torch.autograd.Function.apply = before


def is_in_jax(value: Any) -> bool:
    """Returns True for a tensor that JAX computes, and False for a plain one on the host."""
    from torchax.tensor import Tensor
    from torchax.view import View

    return isinstance(value, Tensor | View)


@contextmanager
def _overloads_of_named_tensors() -> Iterator[None]:
    """Answers the names of overloads for named tensors, which newer versions of PyTorch removed.

    torchax lists them as keys of its tables of operations. Nothing can call them.
    """
    from torch._ops import OpOverloadPacket

    look_up = OpOverloadPacket.__getattr__

    def look_up_or_name(packet: OpOverloadPacket, overload: str) -> Any:
        try:
            return look_up(packet, overload)
        except AttributeError:
            if not any(part in overload.lower() for part in ("dimname", "names")):
                raise
            return f"{packet} {overload}"

    OpOverloadPacket.__getattr__ = look_up_or_name
    try:
        yield
    finally:
        OpOverloadPacket.__getattr__ = look_up
