"""Plain tensors of the host among those that JAX computes.

A model counts positions, sizes and places in integers. Where they come from shapes alone, they stay
plain tensors, whose values its code may ask for.
"""

from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import _disable_current_modes

from adamerge_jax.models.bridge.torch_in_jax import is_in_jax

_SIZED = (torch.nn.functional.interpolate, torch.nn.functional.pad, torch.multinomial)
"""Functions of a tensor whose other arguments are sizes, which may be plain tensors."""

_LIKE = (torch.full_like, torch.ones_like, torch.zeros_like, torch.empty_like)
"""Functions that make a tensor of another's shape, on the host where that one is."""


def take_in_constants(environment: Any) -> None:
    """Makes plain tensors, such as positions counted on the host, meet those that JAX computes."""
    from torchax.tensor import Tensor
    from torchax.view import View

    unwrap, dispatch = environment.t2j_iso, environment.dispatch

    def take_in(value: Any) -> Any:
        return value if is_in_jax(value) else Tensor(environment.t2j_copy(value), environment)

    def unwrap_all(values: Any) -> Any:
        return unwrap(_pytree.tree_map_only(torch.Tensor, take_in, values))

    def dispatch_indices(function: Any, types: Any, arguments: Any, options: Any = None) -> Any:
        first = arguments[0] if arguments else None
        if function is torch.Tensor.to and _counts(first):
            # Stays on the host, where its values are known: a model may need them as sizes.
            moved = _without_devices(arguments[1:]), _without_devices(options or {})
            return first.to(*moved[0], **moved[1]) if any(moved) else first
        if function is torch.nn.functional.one_hot and _is_on_host(first):
            # PyTorch fills a tensor of zeros, which JAX would make.
            with _disable_current_modes():
                return function(*arguments, **(options or {}))
        is_counted = _are_integers(first) or _counts(first)
        counts_integers = function in (torch.tensor, torch.as_tensor) and is_counted
        if counts_integers or (function in _LIKE and _is_on_host(first)):
            options = _without_devices(options or {})
        is_written = _writes(function) and _is_on_host(first)
        if is_written and any(map(is_in_jax, _leaves((arguments[1:], options)))):
            raise NotImplementedError("a computed value is written into a constant tensor")
        if function is torch.Tensor.__getitem__ and any(map(is_in_jax, _leaves(arguments[1]))):
            arguments = (take_in(arguments[0]), *arguments[1:])
        if function is torch.Tensor.__getitem__ and isinstance(arguments[0], View):
            arguments = (arguments[0].torch(), *arguments[1:])
        if function is torch.Tensor.__getitem__ and is_in_jax(arguments[0]):
            arguments = (arguments[0], _without_masks(arguments[1]))
        if function in _SIZED:
            sizes, options = _as_numbers((arguments[1:], options or {}))
            arguments = (*arguments[:1], *sizes)
        if function is torch.arange:
            arguments, options = _as_numbers((arguments, options or {}))
            if "end" in options:
                rest = {name: value for name, value in options.items() if name != "end"}
                arguments, options = (rest.pop("start", 0), options["end"]), rest
        is_taken_apart = (
            isinstance(function, torch._ops.OpOverload) and function not in environment._ops
        )
        if is_taken_apart and any(map(is_in_jax, _leaves((arguments, options)))):
            # PyTorch does it, and has all of it on one device.
            arguments, options = _pytree.tree_map_only(torch.Tensor, take_in, (arguments, options))
        return dispatch(function, types, arguments, options)

    environment.t2j_iso = unwrap_all
    environment.dispatch = dispatch_indices


def _without_masks(index: Any) -> Any:
    """Returns an index in which plain masks are the places of their true entries."""
    pieces = index if isinstance(index, tuple) else (index,)
    new: list[Any] = []
    for piece in pieces:
        is_mask = _is_on_host(piece) and piece.dtype == torch.bool
        new.extend(piece.nonzero(as_tuple=True) if is_mask else (piece,))
    return tuple(new) if isinstance(index, tuple) or len(new) != 1 else new[0]


def _as_numbers(values: Any) -> Any:
    """Returns values in which plain tensors of one number are numbers."""
    return _pytree.tree_map_only(
        torch.Tensor, lambda tensor: tensor.item() if _is_on_host(tensor) else tensor, values
    )


def _is_on_host(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not is_in_jax(value)


def _counts(value: Any) -> bool:
    """Returns True for a plain tensor of integers."""
    return _is_on_host(value) and not (value.is_floating_point() or value.is_complex())


def _are_integers(data: Any) -> bool:
    """Returns True for an integer of Python, or lists of them."""
    if isinstance(data, list | tuple):
        return bool(data) and all(map(_are_integers, data))
    return isinstance(data, int)


def _without_devices(values: Any) -> Any:
    """Returns arguments of a conversion without the device, or options without it.

    A tensor among them stands for its dtype.
    """
    if isinstance(values, dict):
        return {n: value for n, value in values.items() if n not in ("device", "non_blocking")}
    dtypes = [value.dtype if isinstance(value, torch.Tensor) else value for value in values]
    return tuple(value for value in dtypes if isinstance(value, torch.dtype))


def _writes(function: Any) -> bool:
    """Returns True for an operation that changes its first argument."""
    name = getattr(function, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _leaves(value: Any) -> list[Any]:
    return _pytree.tree_leaves(value)
