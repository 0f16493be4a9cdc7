"""The protocol of a merge with nothing to learn."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from jaxtyping import Array

from adamerge_jax.interference import FittedStep
from adamerge_jax.mixing import Mixture, materialize
from adamerge_jax.task_vectors import Delta


class MergeMethod(NamedTuple):
    """A merge with nothing to learn.

    Attributes:
        merge: `(base, deltas, K) -> merged`, all by parameter name, stacked where the name is:
            the base's parameters `[*shape]`, the task vectors of K experts, and for each of these
            either the merged parameter `[*shape]` or a `Mixture` that becomes it. It may be called
            for all parameters at once or for one after the other.
        interference: Steps that change the task vectors first.
    """

    merge: Callable[[Mapping[str, Array], Mapping[str, Delta], int], Mapping[str, Array | Mixture]]
    interference: tuple[FittedStep, ...] = ()


_materialize = jax.jit(materialize)


def merged_parameters(
    method: MergeMethod, base: Mapping[str, Array], deltas: Mapping[str, Delta], experts: int
) -> dict[str, Array]:
    """Merges all parameters that experts changed; the others stay the base's.

    Args:
        method: Whose interference steps have changed `deltas` already.
        base: Parameters of the base by name.
        deltas: Task vectors of the K experts by parameter name.
        experts: K.

    Returns:
        The merged model's parameters, in the dtype of the base.
    """
    return _materialize({**base, **method.merge(base, deltas, experts)})
