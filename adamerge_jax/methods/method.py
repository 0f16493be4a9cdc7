"""The protocol of a merge with nothing to learn."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxtyping import Array

from adamerge_jax.interference import FittedStep
from adamerge_jax.mixing import Mixture, materialize_compiled
from adamerge_jax.task_vectors import Delta


class MergeMethod(NamedTuple):
    """A merge with nothing to learn.

    Attributes:
        merge: The function `(base, deltas, K) -> merged`, with dictionaries by parameter name (also
            of stacked parameters): the base's parameters `[*shape]`, the task vectors of K experts,
            and for each task vector the merged parameter `[*shape]` or a `Mixture` that becomes it.
            It may be called for all parameters at once or for one after the other.
        interference: The steps that change the task vectors first.
    """

    merge: Callable[[Mapping[str, Array], Mapping[str, Delta], int], Mapping[str, Array | Mixture]]
    interference: tuple[FittedStep, ...] = ()


def merged_parameters(
    method: MergeMethod, base: Mapping[str, Array], deltas: Mapping[str, Delta], experts: int
) -> dict[str, Array]:
    """Merges all parameters that experts changed; the others stay the base's.

    Args:
        method: The method; its interference steps have changed `deltas` already.
        base: The parameters of the base by name.
        deltas: The task vectors of the K experts by parameter name.
        experts: The number of experts, K.

    Returns:
        The merged model's parameters by name, `[*shape]`, in the dtype of the base.
    """
    return materialize_compiled({**base, **method.merge(base, deltas, experts)})
