"""Pseudo-labels: the merged model's own classes, on augmented examples."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adamerge_jax.objectives.distributions import log_softmax, pick
from adamerge_jax.objectives.objective import Objective
from adamerge_jax.objectives.targets import Targets, TargetSpec, TaskOutputs


def pseudo_labels(threshold: float = 0.95) -> Objective:
    """Cross-entropy of an augmented example to the class that the merged model gives the plain one.

    FixMatch (Sohn et al., NeurIPS 2020) without labels, as in aTLAS's test-time adaptation. An
    example counts if the confidence in its class, `max_c softmax(z)_c`, reaches the lower of
    `threshold` and the mean confidence over the task's examples in the batch. So the bar rises as
    the model gets surer, and there is always something to learn from (the global threshold of
    FreeMatch, Wang et al., ICLR 2023, of one batch). Pseudo-labels are not differentiated.

    Args:
        threshold: The highest bar, from 0 to 1.

    Raises:
        ValueError: The threshold is not from 0 to 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.objectives import Targets, TaskOutputs, pseudo_labels
        >>> plain = jnp.array([[9.0, 0.0], [0.1, 0.0]])  # only the first is sure enough
        >>> outputs = TaskOutputs(plain, augmented_logits=jnp.zeros((2, 2)))
        >>> print(pseudo_labels().value(outputs, Targets()).round(2))  # the mean is that of one
        [1.39 0.  ]
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}, expected from 0 to 1")

    def value(outputs: TaskOutputs, targets: Targets) -> Float[Array, " B"]:
        probabilities = jax.lax.stop_gradient(jnp.exp(log_softmax(outputs.logits)))
        confidence = probabilities.max(-1)
        # The rounded mean of equal values may lie above them.
        bar = jnp.minimum(confidence.mean(), confidence.max())
        counts = confidence >= jnp.minimum(threshold, bar)
        loss = -pick(log_softmax(outputs.augmented_logits), probabilities.argmax(-1))
        return jnp.where(counts, loss, 0) * counts.size / counts.sum()

    return Objective(value, TargetSpec(augmented=True, whole_batch=True))
