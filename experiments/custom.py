"""A granularity and an objective of one's own, each one function.

A recipe names them as `custom:by_kind` and `custom:confidence`, where this file can be imported.
"""

import jax
from jaxtyping import Array, Float

from adamerge_jax import extension
from adamerge_jax.coefficients.granularities import Granularity, Shapes, groups
from adamerge_jax.objectives import Objective, Targets, TaskOutputs


@extension
def by_kind(shapes: Shapes) -> Granularity:
    """Returns one coefficient per expert for all attention, one for all the rest."""
    return groups(shapes, {"attention": ["*.attention.*"]})


@extension
def confidence(power: float = 2.0) -> Objective:
    """Returns `1 - sum_c p_c^power`, which is low where one class has all the probability."""

    def value(outputs: TaskOutputs, targets: Targets) -> Float[Array, " B"]:
        return 1 - (jax.nn.softmax(outputs.logits) ** power).sum(-1)

    return Objective(value)
