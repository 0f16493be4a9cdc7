"""Heads that are learned with the coefficients, as SyMerge (Jung et al., 2025) learns one layer."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

Heads = Sequence[Mapping[str, Float[Array, "..."]]]
"""Parameters of each task's head by name."""


class HeadLearning(NamedTuple):
    """The learning of heads beside the coefficients.

    Attributes:
        names: The names of the parameters of heads that are learned, as far as a head has them.
        optimizer: The optimizer. Its updates are multiplied with the root mean square of the
            expert's head, so that a learning rate is a fraction of the head whatever its size.
        ridge: The weight of the distance to the expert's head: the mean square of the differences
            of its entries, divided by the mean square of the entries themselves.
    """

    names: tuple[str, ...]
    optimizer: optax.GradientTransformation
    ridge: float = 0.0

    def init(self, expert_heads: Heads) -> tuple[Heads, optax.OptState]:
        """Returns the heads that learning starts from, float32, and the optimizer's state."""
        heads = [
            {name: jnp.asarray(head[name], jnp.float32) for name in self.names if name in head}
            for head in expert_heads
        ]
        return heads, self.optimizer.init(heads)

    def update(
        self, heads: Heads, gradient: Heads, state: optax.OptState, expert_heads: Heads
    ) -> tuple[Heads, optax.OptState]:
        """Returns the heads after a step, and the optimizer's state.

        Args:
            heads: The learned parameters of each head.
            gradient: The objective's gradient with respect to them.
            state: The optimizer's state.
            expert_heads: The experts' heads, with these parameters and perhaps others.
        """
        sizes = [_size(head, expert) for head, expert in zip(heads, expert_heads, strict=True)]
        if self.ridge:
            gradient = [
                jax.tree.map(jnp.add, head_gradient, self._pull(head, expert, size))
                for head_gradient, head, expert, size in zip(
                    gradient, heads, expert_heads, sizes, strict=True
                )
            ]
        updates, state = self.optimizer.update(gradient, state, heads)
        scaled = [
            jax.tree.map(lambda update, size=size: update * size, head_updates)
            for head_updates, size in zip(updates, sizes, strict=True)
        ]
        return optax.apply_updates(heads, scaled), state

    def _pull(
        self, head: Mapping[str, Array], expert: Mapping[str, Array], size: Float[Array, ""]
    ) -> dict[str, Array]:
        """Returns the gradient of the distance to the expert's head."""
        entries = sum(array.size for array in head.values())
        factor = 2 * self.ridge / (entries * size**2)
        return {name: factor * (array - expert[name]) for name, array in head.items()}


def _size(head: Mapping[str, Array], expert: Mapping[str, Array]) -> Float[Array, ""]:
    """Returns the root mean square of the entries of the expert's head that are learned."""
    squares = sum(jnp.square(expert[name].astype(jnp.float32)).sum() for name in head)
    entries = sum(array.size for array in head.values())
    return jnp.sqrt(jnp.maximum(squares / entries, jnp.finfo(jnp.float32).tiny))


def replaced_heads(expert_heads: Heads, learned: Heads) -> Heads:
    """Returns the experts' heads with the learned parameters in place of their own."""
    if not learned:
        return expert_heads
    pairs = zip(expert_heads, learned, strict=True)
    return [{**expert, **head} for expert, head in pairs]
