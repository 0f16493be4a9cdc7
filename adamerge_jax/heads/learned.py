"""Heads that are learned with the coefficients, as SyMerge (Jung et al., 2025) learns one layer."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from adamerge_jax.stacks import Stacked

Heads = Sequence[Mapping[str, Float[Array, "..."]]]
"""Parameters of each task's head by name; `Stacked` where they are learned."""


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
        tiny = jnp.finfo(jnp.float32).tiny

        def of_entries(value: Callable[[int, Array], Array]) -> Float[Array, " N"]:
            """Returns a value of each head, from its size and mean square, at all its entries."""

            def of_group(group: Mapping[str, Float[Array, "G ..."]]) -> PyTree[Array]:
                flat = {name: array.reshape(len(array), -1) for name, array in group.items()}
                entries = sum(array.shape[1] for array in flat.values())
                sums = sum(jnp.square(array).sum(1) for array in flat.values())
                values = value(entries, jnp.maximum(sums / entries, tiny))
                return {
                    name: jnp.broadcast_to(values[:, None], array.shape)
                    for name, array in flat.items()
                }

            return ravel_pytree([of_group(group) for group in heads.groups if group])[0]

        sizes = of_entries(lambda entries, square: jnp.sqrt(square))
        pulls = None
        if self.ridge:
            pulls = of_entries(lambda entries, square: 2 * self.ridge / (entries * square))
        return heads, HeadState(self.optimizer.init(ravel_pytree(heads)[0]), sizes, pulls)

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

    def _learned_parts(self, heads: Heads) -> Stacked:
        """Returns those parameters of each head that are learned, float32."""
        stacks = Stacked.of(heads)
        groups = (
            {name: jnp.asarray(group[name], jnp.float32) for name in self.names if name in group}
            for group in stacks.groups
        )
        return Stacked(tuple(groups), stacks.tasks)


def replaced_heads(expert_heads: Heads, learned: Heads) -> Heads:
    """Returns the experts' heads with the learned parameters in place of their own."""
    if not learned:
        return expert_heads
    experts = Stacked.of(expert_heads)
    pairs = zip(experts.groups, Stacked.of(learned).groups, strict=True)
    return Stacked(tuple({**expert, **head} for expert, head in pairs), experts.tasks)
