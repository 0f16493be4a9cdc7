"""Entropy minimisation: the objective of AdaMerging."""

from jaxtyping import Array, Float

from adamerge_jax.objectives.distributions import log_softmax, mean_per_example, shannon_entropy
from adamerge_jax.objectives.objective import Objective
from adamerge_jax.objectives.targets import Targets, TaskOutputs


def entropy() -> Objective:
    """Shannon entropy of the predicted class distribution, in nats (AdaMerging, eq. 7).

    `-sum_c softmax(z)_c log softmax(z)_c` with z the merged model's logits.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.objectives import Targets, TaskOutputs, entropy
        >>> outputs = TaskOutputs(jnp.array([[0.0, 0.0], [9.0, -9.0]]))  # unsure, sure
        >>> print(entropy().value(outputs, Targets()).round(2))
        [0.69 0.  ]
    """

    def value(outputs: TaskOutputs, targets: Targets) -> Float[Array, " B"]:
        return mean_per_example(shannon_entropy(log_softmax(outputs.logits)), targets)

    return Objective(value)
