"""The optimizer of a recipe: an optax transformation by name."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from adamerge_jax.errors import InputError, shorten
from adamerge_jax.learning import concrete, frank_wolfe, schedules

if TYPE_CHECKING:
    from adamerge_jax.recipes.schema import OptimizerRecipe


def build_optimizer(settings: "OptimizerRecipe", steps: int) -> optax.GradientTransformation:
    """Builds the optax transformation for a number of steps, once for the same settings.

    Args:
        settings: Names the optimizer, its schedule and their options.
        steps: Number of optimizer steps, with which a decaying schedule ends.

    Raises:
        InputError: optax has no such optimizer or schedule, or refuses an option.
    """
    try:
        key = settings.model_dump_json(), steps
    except ValueError:  # an option that only Python can say
        return _build(settings, steps)
    if key not in _BUILT:
        _BUILT[key] = _build(settings, steps)
    return _BUILT[key]


_BUILT: dict[tuple[str, int], optax.GradientTransformation] = {}


def _build(settings: "OptimizerRecipe", steps: int) -> optax.GradientTransformation:
    rate = settings.learning_rate
    if settings.schedule is not None:
        options = {"init_value": rate} | settings.schedule_options
        modules = [schedules, optax.schedules]
        function = _find(modules, settings.schedule)
        if function and "decay_steps" in inspect.signature(function).parameters:
            options = {"decay_steps": steps} | options
        rate = _call_optax("learning.optimizer.schedule", settings.schedule, modules, options)
    if "learning_rate" in settings.options:
        raise InputError(
            "learning.optimizer.options: learning_rate is a field of its own, "
            "learning.optimizer.learning_rate"
        )
    options = settings.options | {"learning_rate": rate}
    field = "learning.optimizer.name"
    optimizer = _call_optax(
        field, settings.name, [concrete, frank_wolfe, optax, optax.contrib], options
    )
    if not isinstance(optimizer, optax.GradientTransformation):
        raise InputError(f"{field}: optax.{settings.name} is no optimizer; use e.g. adam")
    if settings.clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)


def require_gradient_alone(optimizer: optax.GradientTransformation, name: str) -> None:
    """Refuses an optimizer that a gradient is not enough for, such as one with a line search.

    Raises:
        InputError: Names the optimizer.
    """
    try:
        jax.eval_shape(
            lambda one: optimizer.update(one, optimizer.init(one), one), jnp.zeros((1, 1))
        )
    except TypeError as error:
        raise InputError(
            f"learning.optimizer.name: optax.{name} asks for more than a gradient in each step; "
            "use e.g. adam"
        ) from error


def _call_optax(
    field: str, name: str, modules: Sequence[ModuleType], options: Mapping[str, Any]
) -> Any:
    """Calls a function of optax by name."""
    function = _find(modules, name)
    if function is None:
        public = [n for module in modules for n in dir(module) if not n.startswith("_")]
        nearest = difflib.get_close_matches(name, public, n=1, cutoff=0.0)
        raise InputError(f"{field}: optax has no {name!r}; did you mean {nearest[0]!r}?")
    _require_numbers(field, function, options)
    try:
        return function(**options)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{field}: optax.{name} says: {reason}") from error


def _require_numbers(field: str, function: Callable, options: Mapping[str, Any]) -> None:
    """Refuses options that are no number where the default is one, and rates beyond their range.

    optax takes anything, and fails in the first step or learns NaN.
    """
    for option, parameter in inspect.signature(function).parameters.items():
        value, default = options.get(option), parameter.default
        if option not in options or callable(value):  # a schedule of one's own
            continue
        if _is_number(default) and not _is_number(value):
            raise InputError(f"{field}: {option} is {shorten(repr(value))}, expected a number")
        if option in _BELOW_ONE and _is_number(value) and not 0 <= value < 1:
            raise InputError(f"{field}: {option} is {value!r}, expected from 0 and under 1")
        if option.startswith("eps") and _is_number(value) and value < 0:
            raise InputError(f"{field}: {option} is {value!r}, expected at least 0")


_BELOW_ONE = ("b1", "b2", "b3", "decay", "momentum", "rho")
"""Decay rates of moving averages in optax's optimizers."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _find(modules: Sequence[ModuleType], name: str) -> Any:
    """Returns the public function of that name in the first module that has one, or None."""
    functions = (getattr(m, name) for m in modules if callable(getattr(m, name, None)))
    return None if name.startswith("_") else next(functions, None)
