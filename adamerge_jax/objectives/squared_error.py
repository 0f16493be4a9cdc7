"""Squared error of numbers, for the few examples that have labels."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from adamerge_jax.objectives.objective import Objective
from adamerge_jax.objectives.targets import Targets, TargetSpec, TaskOutputs


def squared_error() -> Objective:
    """Mean squared difference to the labels, in their unit squared.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.objectives import Targets, TaskOutputs, squared_error
        >>> outputs = TaskOutputs(jnp.array([[1.0], [4.0]]))  # [B, R]
        >>> targets = Targets(labels=jnp.array([[1.0], [2.0]]))
        >>> squared_error().value(outputs, targets).tolist()
        [0.0, 4.0]
    """

    def value(outputs: TaskOutputs, targets: Targets) -> Float[Array, " B"]:
        return jnp.square(outputs.logits.astype(jnp.float32) - targets.labels).mean(-1)

    return Objective(value, TargetSpec(labels=True))
