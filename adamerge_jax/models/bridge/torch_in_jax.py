"""`torchax`, imported once: PyTorch's operations computed by JAX."""

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from adamerge_jax.errors import InputError


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
    from adamerge_jax.models.bridge.operations import replace_operations

    replace_operations(environment)
    _take_in_constants(environment)
    return environment


def _take_in_constants(environment: Any) -> None:
    """Makes plain tensors, such as positions counted on the host, meet those that JAX computes."""
    import torch
    from torch.utils import _pytree
    from torchax.tensor import Tensor

    unwrap = environment.t2j_iso

    def take_in(value: Any) -> Any:
        return value if is_in_jax(value) else Tensor(environment.t2j_copy(value), environment)

    def unwrap_all(values: Any) -> Any:
        return unwrap(_pytree.tree_map_only(torch.Tensor, take_in, values))

    environment.t2j_iso = unwrap_all


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
