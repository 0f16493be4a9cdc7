"""Choices of a recipe by name: the package's own, and those of a user's module."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from adamerge_jax.errors import InputError

T = TypeVar("T")


def find_registered(field: str, registry: Mapping[str, Callable[..., T]], name: str) -> Callable:
    """The function that a recipe names.

    Args:
        field: Field of the recipe, which begins error messages.
        registry: The package's own functions by name.
        name: One of them, or `package.module:function`.

    Raises:
        InputError: There is no such function.
    """
    if ":" not in name:
        if name not in registry:
            nearest = difflib.get_close_matches(name, registry, n=1, cutoff=0.0)
            raise InputError(
                f"{field}: found {name!r}; expected one of {', '.join(registry)}, or "
                f"'package.module:function' (nearest is {nearest[0]!r})"
            )
        return registry[name]
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{field}: {name!r} cannot be imported ({error})") from error
    if not callable(found):
        raise InputError(f"{field}: {name!r} is no function")
    return found


def call_registered(
    field: str,
    registry: Mapping[str, Callable[..., T]],
    name: str,
    options: Mapping[str, Any],
    arguments: Sequence[Any] = (),
) -> T:
    """Calls the function that a recipe names with the options it gives.

    Args:
        field: Field of the recipe, which begins error messages.
        registry: The package's own functions by name.
        name: One of them, or `package.module:function`.
        options: Keyword arguments, from the recipe.
        arguments: Positional arguments that come before them.

    Raises:
        InputError: There is no such function, or it does not take these options.
    """
    function = find_registered(field, registry, name)
    try:
        inspect.signature(function).bind(*arguments, **options)
    except TypeError as error:
        known = list(inspect.signature(function).parameters)[len(arguments) :]
        raise InputError(
            f"{field}: {name} says: {error}; its options are {', '.join(known) or 'none'}"
        ) from error
    try:
        return function(*arguments, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"{field}: {name} says: {' '.join(str(error).split())}") from error
