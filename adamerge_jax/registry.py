"""Choices of a recipe by name: the package's own, and functions of the user's own modules.

A file names choices, and files come from strangers. A name such as `package.module:function` is
therefore imported only where the user allows it (`allow_code`), and called only if whoever wrote
the function marked it for this use (`extension`).
"""

import copy
import difflib
import importlib
import inspect
import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from adamerge_jax.errors import InputError, in_one_line, shorten

T = TypeVar("T")
F = TypeVar("F", bound=Callable)

_RESULTS: dict[Hashable, Any] = {}
"""Results by function, options and arguments; see `call_registered`."""

_ALLOWED: set[str] = set()
"""The names `package.module:function` that this process may import; see `allow_code`."""

_EXTENSIONS: set[Callable] = set()
"""The functions that are marked; see `extension`."""


def extension(function: F) -> F:
    """Marks a function as one that recipes may name as `package.module:function`.

    Args:
        function: A function that returns an objective, a granularity, a regularizer, an
            interference step or a merge method.

    Returns:
        The same function.

    Examples:
        >>> import adamerge_jax as am
        >>> @am.extension
        ... def by_kind(shapes):
        ...     return am.granularities.groups(shapes, {"attention": ["*.attention.*"]})
    """
    _EXTENSIONS.add(function)
    return function


def choice_in_words(name: str, options: Mapping[str, Any]) -> str:
    """Returns a choice with its options, as people read it: `ties (density 0.3)`."""
    words = ", ".join(f"{option} {value}" for option, value in options.items())
    return f"{name} ({words})" if words else name


def is_own_code(name: str) -> bool:
    """Returns True for the name of a function of the user's own: `package.module:function`."""
    return ":" in name


def allow_code(names: Iterable[str]) -> None:
    """Allows this process to import functions of the user's own; imports nothing yet.

    Args:
        names: Their names, `package.module:function`.
    """
    _ALLOWED.update(name for name in names if is_own_code(name))


def require_allowed(field: str, name: str) -> None:
    """Refuses a function of somebody's own that this process may not import.

    Args:
        field: Field of the recipe, which begins error messages.
        name: Its name, `package.module:function`.

    Raises:
        InputError: It is not among those of `allow_code`.
    """
    if name not in _ALLOWED:
        raise InputError(
            f"{field}: {name!r} is code of somebody's own, which runs only where a recipe names it "
            "and code is allowed; if you trust it, give --allow-code (in Python allow_code=True)"
        )


def find_registered(field: str, registry: Mapping[str, Callable[..., T]], name: str) -> Callable:
    """Returns the function that a recipe names.

    Args:
        field: Field of the recipe, which begins error messages.
        registry: The package's own functions by name.
        name: One of them, or `package.module:function`.

    Raises:
        InputError: There is no such function, or it may not be called.
    """
    if not is_own_code(name):
        if name not in registry:
            nearest = difflib.get_close_matches(name, registry, n=1, cutoff=0.0)
            raise InputError(
                f"{field}: found {name!r}; expected one of {', '.join(registry)}, or "
                f"'package.module:function' (nearest is {nearest[0]!r})"
            )
        return registry[name]
    require_allowed(field, name)
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    # A module of the user's own may fail in any way.
    except Exception as error:
        raise InputError(
            f"{field}: {name!r} cannot be imported ({type(error).__name__}: {in_one_line(error)})"
        ) from error
    if not isinstance(function, Hashable) or function not in _EXTENSIONS:
        raise InputError(
            f"{field}: {name!r} is not marked as an extension; write @adamerge_jax.extension above "
            "its definition if it is meant to be called"
        )
    return function


def call_registered(
    field: str,
    registry: Mapping[str, Callable[..., T]],
    name: str,
    options: Mapping[str, Any],
    arguments: Sequence[Any] = (),
    *,
    returns: type,
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
        returns: The type of the result.

    Raises:
        InputError: There is no such function, it may not be called, it does not take these options,
            or it returns something else.
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
    if not is_own_code(name):
        _require_declared(f"{field}: {name}", function, options)
    # The package's functions refuse options by these; one of somebody's own may fail in any way.
    refusals = (Exception,) if is_own_code(name) else (TypeError, ValueError)
    try:
        result = function(*arguments, **options)
    except refusals as error:
        raise InputError(f"{field}: {name} says: {' '.join(str(error).split())}") from error
    if not isinstance(result, returns):
        raise InputError(
            f"{field}: {name} returns {type(result).__name__}, expected {returns.__name__}"
        )
    if key is not None:
        _RESULTS[key] = result
    return result


_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
"""The plain types of options, in words."""


def _require_declared(where: str, function: Callable, options: Mapping[str, Any]) -> None:
    """Refuses options of other types than a function declares, as far as these are plain ones.

    Args:
        where: The beginning of error messages.
        function: A function of the package, all of whose parameters are annotated.
        options: Keyword arguments of it.
    """
    for option, declared in get_type_hints(function).items():
        is_union = get_origin(declared) in (Union, UnionType)
        types = set(get_args(declared) if is_union else [declared])
        if option not in options or not types <= _PLAIN.keys() | {NoneType}:
            continue
        value = options[option]
        if isinstance(value, bool) or not isinstance(value, Real):
            fits = type(value) in types
        elif isinstance(value, Integral):
            fits = bool(types & {int, float})
        else:
            fits = float in types
        # Infinity is no number to calculate with, and NaN is less than nothing.
        if not fits or (isinstance(value, Real) and not abs(value) < float("inf")):
            expected = " or ".join(_PLAIN[kind] for kind in _PLAIN if kind in types)
            raise InputError(
                f"{where} says: {option} is {shorten(repr(value))}, expected {expected}"
            )


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
