"""Frank-Wolfe steps between models, for coefficients that make the merge an average of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from adamerge_jax.errors import InputError


class FrankWolfeState(NamedTuple):
    """The number of steps taken."""

    count: Int[Array, ""]


def frank_wolfe(
    learning_rate: optax.ScalarOrSchedule, base: bool = True
) -> optax.GradientTransformation:
    """Steps towards the model with the smallest inner product with the gradient (FW-Merging).

        s = argmin_k <theta_k, g>,  theta <- (1 - gamma) theta + gamma s

    with g the gradient of the objective in the merged weights theta. As theta is the average of
    base and experts with the coefficients lambda as weights, this is a step in lambda: by the chain
    rule the gradient in lambda_k is <tau_k, g>, which is <theta_k, g> up to a number that is the
    same for all k, and the step is `lambda <- (1 - gamma) lambda + gamma e_s`. So no array of the
    size of the weights is kept, and with task vectors on disk one tensor of one expert is read at a
    time. Every group of coefficients takes its own step: `task` is the paper's task-wise choice,
    `tensor` its layer-wise one.

    Args:
        learning_rate: gamma, from 0 to 1; `harmonic` is Frank and Wolfe's schedule.
        base: True where the base is one of the models, as the start of the authors' code is. Under
            the constraint `simplex`, which has no weight for it, False.

    Returns:
        A transformation for coefficients `[G, K, ...]`, which must be on the simplex.

    Raises:
        InputError: `base` is neither true nor false.

    Source: FW-Merging, Chen et al., ICCV 2025 (hard). The authors' code compares cosines, summed
    over tensors, where the paper and this have inner products.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from adamerge_jax.learning.frank_wolfe import frank_wolfe
        >>> coefficients = jnp.array([[0.5, 0.5, 0.0]])  # [G, K]
        >>> optimizer = frank_wolfe(0.5)
        >>> gradient = jnp.array([[0.1, -0.2, -0.7]])
        >>> updates, _ = optimizer.update(gradient, optimizer.init(coefficients), coefficients)
        >>> optax.apply_updates(coefficients, updates).tolist()
        [[0.25, 0.25, 0.5]]
    """
    if not isinstance(base, bool):
        raise InputError(f"learning.optimizer.options: base is {base!r}, expected true or false")

    def init(params: optax.Params) -> FrankWolfeState:
        return FrankWolfeState(jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates, state: FrankWolfeState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, FrankWolfeState]:
        gamma = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def towards(
            gradient: Float[Array, "G K ..."], values: Float[Array, "G K ..."]
        ) -> Float[Array, "G K ..."]:
            best = gradient.argmin(1)
            vertex = jax.nn.one_hot(best, gradient.shape[1], axis=1, dtype=values.dtype)
            if base:
                vertex = vertex * (gradient.min(1, keepdims=True) < 0)
            return gamma * (vertex - values)

        return jax.tree.map(towards, updates, params), FrankWolfeState(state.count + 1)

    return optax.GradientTransformation(init, update)
