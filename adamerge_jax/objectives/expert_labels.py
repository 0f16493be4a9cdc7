"""The expert's own classes, where it is at least as sure as the merged model."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adamerge_jax.objectives.distributions import log_softmax, pick
from adamerge_jax.objectives.objective import Objective
from adamerge_jax.objectives.targets import Targets, TargetSpec, TaskOutputs


def expert_labels() -> Objective:
    """Cross-entropy with the expert's class, on examples whose class the expert may judge.

    An example counts if both models give it one class, or if the expert's probability of its class
    is at least the merged model's of its own. The mean is that of the examples that count.

    Source: SyMerge, Jung et al., 2025, expert-guided self-labelling; the choice of examples is that
    of the authors' code.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.objectives import Targets, TaskOutputs, expert_labels
        >>> outputs = TaskOutputs(jnp.array([[0.0, 1.0], [0.0, 3.0]]))
        >>> targets = Targets(expert_logits=jnp.array([[2.0, 0.0], [2.0, 0.0]]))
        >>> [round(float(loss), 2) for loss in expert_labels().value(outputs, targets)]
        [2.63, 0.0]
    """

    def value(outputs: TaskOutputs, targets: Targets) -> Float[Array, " B"]:
        merged, expert = log_softmax(outputs.logits), log_softmax(targets.expert_logits)
        label = expert.argmax(-1)
        agree = label == merged.argmax(-1)
        counts = agree | (expert.max(-1) >= jax.lax.stop_gradient(merged).max(-1))
        loss = -pick(merged, label)
        return jnp.where(counts, loss, 0) * counts.size / jnp.maximum(counts.sum(), 1)

    return Objective(value, TargetSpec(expert_logits=True, whole_batch=True))
