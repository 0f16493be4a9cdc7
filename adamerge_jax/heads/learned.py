"""Heads that are learned with the coefficients, as SyMerge (Jung et al., 2025) learns one layer."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

Heads = Sequence[Mapping[str, Float[Array, "..."]]]
"""Parameters of each task's head by name."""


class HeadState(NamedTuple):
    """The state of the learning of heads; arrays are flat, `[N]`, over the entries of all heads.

    Attributes:
        optimizer: The optimizer's own state.
        sizes: The root mean square of the head that an entry is of.
        pulls: The factor of an entry's distance to the expert's in the gradient of the ridge; None
            without one.
    """

    optimizer: optax.OptState
    sizes: Float[Array, " N"]
    pulls: Float[Array, " N"] | None


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

    def init(self, expert_heads: Heads) -> tuple[Heads, HeadState]:
        """Returns the heads that learning starts from, float32, and the state."""
        heads = self._learned_parts(expert_heads)
        flat_heads = [ravel_pytree(head)[0] for head in heads]
        entries = [head.size for head in flat_heads]
        tiny = jnp.finfo(jnp.float32).tiny
        squares = [jnp.maximum(jnp.square(head).mean(), tiny) for head in flat_heads]
        sizes = jnp.concatenate(
            [jnp.full(n, jnp.sqrt(s)) for n, s in zip(entries, squares, strict=True)]
        )
        pulls = None
        if self.ridge:
            pairs = zip(entries, squares, strict=True)
            pulls = jnp.concatenate([jnp.full(n, 2 * self.ridge / (n * s)) for n, s in pairs])
        return heads, HeadState(self.optimizer.init(jnp.concatenate(flat_heads)), sizes, pulls)

    def update(
        self, heads: Heads, gradient: Heads, state: HeadState, expert_heads: Heads
    ) -> tuple[Heads, HeadState]:
        """Returns the heads after a step, and the state.

        All heads are updated as one vector, which compiles as fast for many as for two.

        Args:
            heads: The learned parameters of each head.
            gradient: The objective's gradient with respect to them.
            state: The state before the step.
            expert_heads: The experts' heads, with these parameters and perhaps others.
        """
        learned, restore = ravel_pytree(heads)
        slopes, _ = ravel_pytree(gradient)
        if state.pulls is not None:
            experts, _ = ravel_pytree(self._learned_parts(expert_heads))
            slopes += state.pulls * (learned - experts)
        updates, optimizer = self.optimizer.update(slopes, state.optimizer, learned)
        return restore(learned + updates * state.sizes), state._replace(optimizer=optimizer)

    def _learned_parts(self, heads: Heads) -> list[dict[str, Float[Array, "..."]]]:
        """Returns those parameters of each head that are learned, float32."""
        return [
            {name: jnp.asarray(head[name], jnp.float32) for name in self.names if name in head}
            for head in heads
        ]


def replaced_heads(expert_heads: Heads, learned: Heads) -> Heads:
    """Returns the experts' heads with the learned parameters in place of their own."""
    if not learned:
        return expert_heads
    pairs = zip(expert_heads, learned, strict=True)
    return [{**expert, **head} for expert, head in pairs]
