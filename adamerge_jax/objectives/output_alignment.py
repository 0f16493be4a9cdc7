"""Alignment with the experts' numbers."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from adamerge_jax.objectives.objective import Objective
from adamerge_jax.objectives.targets import Targets, TargetSpec, TaskOutputs


def output_alignment() -> Objective:
    """Squared distance to the expert's numbers, in units of their spread.

    `mean_r ((z_r - e_r) / s_r)^2` with z the merged model's numbers, e the expert's, and s their
    standard deviation over the task's examples, so that tasks of other units count alike.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.objectives import Targets, TaskOutputs, output_alignment
        >>> outputs = TaskOutputs(jnp.array([[1.0], [4.0]]))  # [B, R]
        >>> numbers, spread = jnp.array([[1.0], [2.0]]), jnp.array([[0.5], [0.5]])
        >>> targets = Targets(expert_logits=numbers, expert_spread=spread)
        >>> output_alignment().value(outputs, targets).tolist()
        [0.0, 16.0]
    """

    def value(outputs: TaskOutputs, targets: Targets) -> Float[Array, " B"]:
        merged, expert = (
            numbers.astype(jnp.float32) for numbers in (outputs.logits, targets.expert_logits)
        )
        return jnp.square((merged - expert) / targets.expert_spread).mean(-1)

    return Objective(value, TargetSpec(expert_logits=True, expert_spread=True))
