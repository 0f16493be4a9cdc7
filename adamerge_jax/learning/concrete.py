"""Learning of a shared mask by meta-learning, then of coefficients under it."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from adamerge_jax.coefficients.granularity import require_whole
from adamerge_jax.errors import InputError


class ConcreteState(NamedTuple):
    """The state between two steps.

    Attributes:
        count: The number of steps taken.
        clean: What is learned, without noise: coefficients as at the start, and the mask's logits.
        mask: The state of the optimizer of logits.
        coefficients: The state of the optimizer of coefficients.
    """

    count: Int[Array, ""]
    clean: PyTree[Array]
    mask: optax.OptState
    coefficients: optax.OptState


def concrete(
    learning_rate: optax.ScalarOrSchedule,
    mask_learning_rate: float = 0.001,
    inner_learning_rate: float = 1.0,
    mask_steps: int = 1000,
    seed: int = 0,
) -> optax.GradientTransformation:
    """Learns a mask at coefficients that are adapted to it, then coefficients under the mask.

    Two steps, on a batch each, are an iteration of the meta-learning. With lambda_0 the
    coefficients at the start and m the mask of logits x with noise (`constraint: concrete`):

        lambda' = lambda_0 - inner_learning_rate * grad_lambda L(lambda_0, m)
        x <- Adam(x, grad_x L(lambda', m));  a new m by new logistic noise on x

    After `mask_steps` the last m stays, and Adam learns the coefficients (AdaMerging), starting
    from lambda_0. The noise of the first m is 0. No gradient goes through the inner step, as in the
    authors' code, whose inner step is Adam's.

    Args:
        learning_rate: Step size of the coefficients under the mask.
        mask_learning_rate: Step size of the logits.
        inner_learning_rate: Step size of the adaptation to a mask.
        mask_steps: The number of steps for the mask, an even number.
        seed: The seed of the noise.

    Returns:
        A transformation for what the constraint `concrete` learns.

    Raises:
        InputError: `mask_steps` or `seed` is no whole number, or the first is odd.

    Source: Concrete subspace learning, Tang et al., 2023.
    """
    require_whole("mask_steps", mask_steps, 2)
    require_whole("seed", seed, 0)
    if mask_steps % 2:
        raise InputError(
            f"learning.optimizer.options: mask_steps is {mask_steps}, expected an even number: an "
            "iteration takes two steps"
        )
    mask_optimizer, coefficient_optimizer = (
        optax.adam(mask_learning_rate),
        optax.adam(learning_rate),
    )

    def init(params: PyTree[Array]) -> ConcreteState:
        logits, scales = _apart(params)
        return ConcreteState(
            jnp.zeros((), jnp.int32),
            params,
            mask_optimizer.init(logits),
            coefficient_optimizer.init(scales),
        )

    def update(
        gradient: PyTree[Array], state: ConcreteState, params: PyTree[Array] | None = None
    ) -> tuple[PyTree[Array], ConcreteState]:
        logit_gradient, scale_gradient = _apart(gradient)
        logits, scales = _apart(params)
        clean, start = _apart(state.clean)

        def adapt() -> tuple[PyTree[Array], ConcreteState]:
            moved = {
                name: start[name] - inner_learning_rate * scale_gradient[name] for name in start
            }
            return _together(params, logits | moved), state

        def learn_mask() -> tuple[PyTree[Array], ConcreteState]:
            updates, mask = mask_optimizer.update(logit_gradient, state.mask, clean)
            learned = optax.apply_updates(clean, updates)
            noise = _noise(learned, jax.random.fold_in(jax.random.key(seed), state.count))
            noisy = {name: learned[name] + noise[name] for name in learned}
            new = state._replace(clean=_together(params, learned | start), mask=mask)
            return _together(params, noisy | start), new

        def learn_coefficients() -> tuple[PyTree[Array], ConcreteState]:
            updates, optimizer = coefficient_optimizer.update(
                scale_gradient, state.coefficients, scales
            )
            moved = optax.apply_updates(scales, updates)
            return _together(params, logits | moved), state._replace(coefficients=optimizer)

        phase = jnp.where(state.count < mask_steps, state.count % 2, 2)
        moved, state = jax.lax.switch(phase, [adapt, learn_mask, learn_coefficients])
        return jax.tree.map(jnp.subtract, moved, params), state._replace(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def _apart(tree: PyTree[Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns the leaves that are logits of masks, and the others, by their paths."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    by_path = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    logits = {name: leaf for name, leaf in by_path.items() if name.endswith("['logits']")}
    return logits, {name: leaf for name, leaf in by_path.items() if name not in logits}


def _together(like: PyTree[Array], leaves: Mapping[str, Array]) -> PyTree[Array]:
    """Returns a tree of these leaves, by the paths of another."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaves[jax.tree_util.keystr(path)], like
    )


def _noise(logits: Mapping[str, Array], key: Array) -> dict[str, Array]:
    """Returns logistic noise, with which a sigmoid is a sample of the Concrete distribution."""
    return {
        name: jax.random.logistic(jax.random.fold_in(key, position), leaf.shape)
        for position, (name, leaf) in enumerate(sorted(logits.items()))
    }
