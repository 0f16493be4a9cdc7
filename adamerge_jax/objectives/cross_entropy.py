"""Cross-entropy to labels, for the few examples that have some."""

from jaxtyping import Array, Float

from adamerge_jax.objectives.distributions import mean_per_example, token_losses
from adamerge_jax.objectives.objective import Objective
from adamerge_jax.objectives.targets import Targets, TargetSpec, TaskOutputs


def cross_entropy() -> Objective:
    """Cross-entropy to the labels, in nats: few-shot learning of coefficients (aTLAS).

    The labels of a language model are the text's own next tokens.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.objectives import Targets, TaskOutputs, cross_entropy
        >>> outputs = TaskOutputs(jnp.array([[9.0, 0.0], [9.0, 0.0]]))
        >>> targets = Targets(labels=jnp.array([0, 1]))
        >>> print(cross_entropy().value(outputs, targets).round(2))
        [0. 9.]
    """

    def value(outputs: TaskOutputs, targets: Targets) -> Float[Array, " B"]:
        return mean_per_example(token_losses(outputs.logits, targets.labels), targets)

    return Objective(value, TargetSpec(labels=True))
