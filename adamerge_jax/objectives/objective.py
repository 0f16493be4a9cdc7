"""The objective: a pure function from a task's outputs and targets to one value per example."""

import functools
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from adamerge_jax.objectives.targets import Targets, TargetSpec, TaskOutputs

_LOGITS_ALONE = TargetSpec()


class _Fields(NamedTuple):
    value: Callable[[TaskOutputs, Targets], Float[Array, " B"]]
    target_spec: TargetSpec
    floor: Callable[[Targets], Float[Array, " B"]] | None = None


class Objective(_Fields):
    """An objective to be minimised.

    Attributes:
        value: `(outputs, targets) -> one value per example [B]`.
        target_spec: The outputs and targets that it asks for.
        floor: `targets -> the value of a model that gives just these, per example [B]`, which is
            subtracted where values are shown; None for 0.
    """

    __slots__ = ()

    def __new__(
        cls,
        value: Callable[[TaskOutputs, Targets], Float[Array, " B"]],
        target_spec: TargetSpec = _LOGITS_ALONE,
        floor: Callable[[Targets], Float[Array, " B"]] | None = None,
        *,
        needs: TargetSpec | None = None,
    ) -> "Objective":
        """Makes an objective; `needs` is the old name of `target_spec`."""
        if needs is not None:
            _warn_of_needs()
        return super().__new__(cls, value, target_spec if needs is None else needs, floor)

    @property
    def needs(self) -> TargetSpec:
        """The old name of `target_spec`."""
        _warn_of_needs()
        return self.target_spec


def weighted_sum(terms: Sequence[tuple[float, Objective]]) -> Objective:
    """The objective `sum_i weight_i * objective_i`; a negative weight raises its objective.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.objectives import Targets, TaskOutputs, entropy, weighted_sum
        >>> outputs = TaskOutputs(jnp.zeros((1, 2)))
        >>> both = weighted_sum([(1.0, entropy()), (-0.5, entropy())])
        >>> print(both.value(outputs, Targets()).round(2))  # [B]
        [0.35]
    """

    def value(outputs: TaskOutputs, targets: Targets) -> Float[Array, " B"]:
        zero = jnp.zeros(outputs.logits.shape[0])
        return sum((w * objective.value(outputs, targets) for w, objective in terms), zero)

    floors = [(w, objective.floor) for w, objective in terms if objective.floor is not None]

    def floor(targets: Targets) -> Float[Array, " B"]:
        return sum(w * of_term(targets) for w, of_term in floors)

    specs = (objective.target_spec for _, objective in terms)
    spec = functools.reduce(operator.or_, specs, _LOGITS_ALONE)
    return Objective(value, spec, floor if floors else None)


def _warn_of_needs() -> None:
    warnings.warn("Objective.needs is now target_spec", DeprecationWarning, stacklevel=3)
