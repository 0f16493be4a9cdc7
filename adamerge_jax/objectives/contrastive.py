"""The contrastive loss of pairs of texts that belong together."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from adamerge_jax.objectives.distributions import log_softmax
from adamerge_jax.objectives.objective import Objective
from adamerge_jax.objectives.similarity import unit_length
from adamerge_jax.objectives.targets import Targets, TargetSpec, TaskOutputs


def contrastive(temperature: float = 0.05) -> Objective:
    """Cross-entropy of a text's partner among the second texts of its task's batch (InfoNCE).

    With q_i and d_i the embeddings of the two texts of pair i, s their cosine and T the
    temperature: `-log( exp(s(q_i, d_i) / T) / sum_j exp(s(q_i, d_j) / T) )`, in nats. Every second
    text of the batch but its own is taken for one that does not belong to q_i. The sum has each
    text once, though several pairs may have it (`Targets.partners`): those repeated to fill a batch
    up change nothing.

    Source: van den Oord et al., 2018, of pairs of texts; it is the loss by which Self Positioning
    (Li et al., "Improving General Text Embedding Model", 2024) learns coefficients.

    Args:
        temperature: T.

    Raises:
        ValueError: The temperature is not over 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.objectives import Targets, TaskOutputs, contrastive
        >>> pairs = jnp.array([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])  # [B, 2, H]
        >>> outputs = TaskOutputs(jnp.zeros((2, 1)), embeddings=pairs)
        >>> print(contrastive(1.0).value(outputs, Targets()).round(2))  # both partners are alike
        [0.69 0.69]
    """
    if not 0 < temperature <= 1e6:
        raise ValueError(f"temperature is {temperature}, expected over 0 and up to 1e6")

    def value(outputs: TaskOutputs, targets: Targets) -> Float[Array, " B"]:
        first, second = jnp.moveaxis(unit_length(outputs.embeddings), 1, 0)
        logits = first @ second.T / temperature
        if targets.partners is not None:
            is_same = targets.partners[:, None] == targets.partners
            is_first = is_same.argmax(0) == jnp.arange(len(is_same))
            counts = jnp.eye(len(is_same), dtype=bool) | (is_first & ~is_same)
            logits = jnp.where(counts, logits, -jnp.inf)
        return -jnp.diagonal(log_softmax(logits))

    return Objective(value, TargetSpec(embeddings=True, pairs=True, whole_batch=True))
