"""Choices of a recipe by name: the package's own, and those of a user's module."""

import copy
import difflib
import importlib
import inspect
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

from adamerge_jax.errors import InputError

T = TypeVar("T")

_RESULTS: dict[Hashable, Any] = {}
"""Results by function, options and arguments; see `call_registered`."""


def find_registered(field: str, registry: Mapping[str, Callable[..., T]], name: str) -> Callable:
    """Returns the function that a recipe names.

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
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{field}: {name!r} cannot be imported ({error})") from error
    if not callable(function):
        raise InputError(f"{field}: {name!r} is no function")
    return function


def call_registered(
    field: str,
    registry: Mapping[str, Callable[..., T]],
    name: str,
    options: Mapping[str, Any],
    arguments: Sequence[Any] = (),
) -> T:
    """Calls the function that a recipe names with the options it gives.

    A function must depend on its arguments alone. It is called once per process for the same
    ones, so that an objective or a granularity of a recipe is one object wherever it is asked for.

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
    key = _key(function, options, arguments)
    if key is not None:
        if key in _RESULTS:
            return _RESULTS[key]
        # The result must not change with the recipe.
        options, arguments = copy.deepcopy((dict(options), arguments))
    try:
        inspect.signature(function).bind(*arguments, **options)
    except TypeError as error:
        accepted = list(inspect.signature(function).parameters)[len(arguments) :]
        raise InputError(
            f"{field}: {name} says: {error}; its options are {', '.join(accepted) or 'none'}"
        ) from error
    try:
        result = function(*arguments, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"{field}: {name} says: {' '.join(str(error).split())}") from error
    if key is not None:
        _RESULTS[key] = result
    return result


def _key(
    function: Callable, options: Mapping[str, Any], arguments: Sequence[Any]
) -> Hashable | None:
    """Returns a key of a call, or None where an argument is no plain data that tells it apart.

    The order of options does not count, that within one does.
    """
    try:
        json.dumps([options, arguments])
        hash(function)
    except (TypeError, ValueError):
        return None
    # As text 1, 1.0 and true differ, and a number and its text, which are one key of JSON.
    by_name = sorted((option, repr(value)) for option, value in options.items())
    return function, tuple(by_name), repr(arguments)
