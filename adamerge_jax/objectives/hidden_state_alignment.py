"""Alignment with the experts' hidden states."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from adamerge_jax.objectives.distributions import masked_mean
from adamerge_jax.objectives.objective import Objective
from adamerge_jax.objectives.targets import Targets, TargetSpec, TaskOutputs


def hidden_state_alignment(layers: Sequence[int], relative: bool = False) -> Objective:
    """Mean squared error to the expert's hidden states (Expert Merging, Zhang et al., 2025).

    The mean is over positions that are no padding, features, and the chosen layers.

    Args:
        layers: Which; 0 is the embeddings, L (or -1) the output of the last of L layers.
        relative: Divide each layer's error by the mean square of the expert's hidden states, so
            that layers of unlike scale count alike.

    Raises:
        ValueError: The layers are no list of numbers.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamerge_jax.objectives import Targets, TaskOutputs, hidden_state_alignment
        >>> logits, states = jnp.zeros((2, 3)), jnp.zeros((2, 5, 4))  # [B, C], [B, T, H]
        >>> outputs = TaskOutputs(logits, hidden_states={-1: states})
        >>> targets = Targets(expert_hidden_states={-1: states + 2})
        >>> hidden_state_alignment([-1]).value(outputs, targets).tolist()
        [4.0, 4.0]
    """
    chosen = tuple(layers)
    if not chosen or not all(isinstance(layer, int) for layer in chosen):
        raise ValueError(f"layers is {layers}, expected a list of numbers")

    def value(outputs: TaskOutputs, targets: Targets) -> Float[Array, " B"]:
        errors = []
        for layer in chosen:
            expert = targets.expert_hidden_states[layer].astype(jnp.float32)
            merged = outputs.hidden_states[layer].astype(jnp.float32)
            error = masked_mean(jnp.square(merged - expert).mean(-1), outputs.mask)
            if relative:
                error /= masked_mean(jnp.square(expert).mean(-1), outputs.mask).mean()
            errors.append(error)
        return jnp.stack(errors).mean(0)

    return Objective(value, TargetSpec(hidden_states=chosen, whole_batch=relative))
