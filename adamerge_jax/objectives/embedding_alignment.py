"""Alignment with the experts' embeddings."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from adamerge_jax.objectives.objective import Objective
from adamerge_jax.objectives.similarity import unit_length
from adamerge_jax.objectives.targets import Targets, TargetSpec, TaskOutputs


def embedding_alignment(distance: str = "cosine") -> Objective:
    """Distance between a sentence embedder's embedding and the expert's, the mean over the texts.

    With z the merged model's embedding of a text and e the expert's:

    - `cosine`: `1 - z.e / (|z| |e|)`
    - `squared`: `|z - e|^2`

    Args:
        distance: One of these two.

    Raises:
        ValueError: The distance is neither.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.objectives import Targets, TaskOutputs, embedding_alignment
        >>> embeddings = jnp.array([[[3.0, 0.0]], [[0.0, 2.0]]])  # [B, texts, H]
        >>> outputs = TaskOutputs(jnp.zeros((2, 1)), embeddings=embeddings)
        >>> targets = Targets(expert_embeddings=jnp.array([[[1.0, 0.0]], [[1.0, 0.0]]]))
        >>> embedding_alignment().value(outputs, targets).tolist()
        [0.0, 1.0]
        >>> embedding_alignment("squared").value(outputs, targets).tolist()
        [4.0, 5.0]
    """
    if distance not in ("cosine", "squared"):
        raise ValueError(f"distance is {distance!r}, expected 'cosine' or 'squared'")

    def value(outputs: TaskOutputs, targets: Targets) -> Float[Array, " B"]:
        merged, expert = outputs.embeddings, targets.expert_embeddings
        if distance == "cosine":
            distances = 1 - (unit_length(merged) * unit_length(expert)).sum(-1)
        else:
            difference = merged.astype(jnp.float32) - expert.astype(jnp.float32)
            distances = jnp.square(difference).sum(-1)
        return distances.mean(-1)

    return Objective(value, TargetSpec(embeddings=True, expert_embeddings=True))
