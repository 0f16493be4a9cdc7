"""Distributions over classes: log-probabilities in float32, what objectives compute of them."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adamerge_jax.objectives.targets import NOT_PREDICTED, Targets, TopTokens


def log_softmax(logits: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """Returns log-probabilities, in float32."""
    return jax.nn.log_softmax(logits.astype(jnp.float32))


def shannon_entropy(log_probabilities: Float[Array, "... C"]) -> Float[Array, "..."]:
    """Returns the entropy of each distribution, in nats."""
    return -(jnp.exp(log_probabilities) * log_probabilities).sum(-1)


def pick(values: Float[Array, "... C"], index: Int[Array, "..."]) -> Float[Array, "..."]:
    """Returns the value of one class of each distribution."""
    return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def token_losses(
    logits: Float[Array, "B ... C"], labels: Int[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """Returns the cross-entropy to each label, in nats; 0 where the label is `NOT_PREDICTED`."""
    loss = -pick(log_softmax(logits), jnp.maximum(labels, 0))
    return jnp.where(labels == NOT_PREDICTED, 0, loss)


@functools.partial(jax.jit, static_argnums=1)
def likely_tokens(logits: Float[Array, "B T V"], count: int) -> TopTokens:
    """Returns the `count` likeliest tokens of each position with their log-probabilities."""
    log_probabilities, tokens = jax.lax.top_k(log_softmax(logits), count)
    return TopTokens(tokens, log_probabilities)


def with_rest(
    logits: Float[Array, "B T V"], expert: TopTokens
) -> tuple[Float[Array, "B T k+1"], Float[Array, "B T k+1"]]:
    """Computes log-probabilities of the expert's likely tokens, then of all others as one token.

    Returns:
        Those of the merged model, whose logits are given, and those of the expert.
    """
    merged = log_softmax(logits)
    likely = jnp.take_along_axis(merged, expert.tokens, axis=-1)
    nothing = jnp.log(jnp.finfo(jnp.float32).tiny)
    return (
        jnp.concatenate([likely, _rest(merged, expert.tokens, nothing)], -1),
        top_with_rest(expert),
    )


def top_with_rest(expert: TopTokens) -> Float[Array, "B T k+1"]:
    """Computes log-probabilities of the expert's likely tokens, then of all others as one token."""
    smallest = jnp.finfo(jnp.float32).tiny
    rest = 1 - jnp.exp(expert.log_probabilities).sum(-1, keepdims=True)
    return jnp.concatenate([expert.log_probabilities, jnp.log(jnp.maximum(rest, smallest))], -1)


def _rest(
    log_probabilities: Float[Array, "B T V"], tokens: Int[Array, "B T k"], nothing: Float[Array, ""]
) -> Float[Array, "B T 1"]:
    """Computes the log-probability of all tokens but these, or `nothing` if these are all.

    Where the model is sure, 1 less the probabilities of these would be rounded to 0, and there
    would be no gradient.
    """
    if tokens.shape[-1] == log_probabilities.shape[-1]:
        return jnp.full((*tokens.shape[:-1], 1), nothing)
    # A mask of one byte per token rather than a second array of the log-probabilities' size.
    mark = jax.vmap(jax.vmap(lambda mask, chosen: mask.at[chosen].set(True)))
    marked = mark(jnp.zeros(log_probabilities.shape, bool), tokens)
    others = jnp.where(marked, -jnp.inf, log_probabilities)
    # `jax.nn.logsumexp` would keep an array of that size for the backward pass.
    largest = jax.lax.stop_gradient(others.max(-1, keepdims=True))
    return largest + jnp.log(jnp.exp(others - largest).sum(-1, keepdims=True))


def mean_per_example(values: Float[Array, "B ..."], targets: Targets) -> Float[Array, " B"]:
    """Returns values of examples as they are; of positions, the mean over those to be predicted.

    Of labels, which all count, it is the mean over them.
    """
    if values.ndim == 1:
        return values
    if targets.counted is not None:
        return masked_mean(values, targets.counted)
    return masked_mean(values, None if targets.labels is None else targets.labels != NOT_PREDICTED)


def masked_mean(values: Float[Array, "B T"], mask: Int[Array, "B T"] | None) -> Float[Array, " B"]:
    """Returns the mean over positions where the mask is 1; over all where there is none."""
    if mask is None:
        return values.mean(-1)
    return jnp.where(mask == 1, values, 0).sum(-1) / jnp.maximum(mask.sum(-1), 1)
