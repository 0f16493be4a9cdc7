"""The diagonal of the Fisher information: squared gradients of log-probabilities, by example."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree

from adamerge_jax.objectives.distributions import (
    log_softmax,
    masked_mean,
    pick,
    shannon_entropy,
)
from adamerge_jax.objectives.targets import NOT_PREDICTED
from adamerge_jax.statistics.grams import CalibrationBatch

Logits = Callable[[Mapping[str, Array], PyTree, Mapping[str, Array]], Float[Array, "B ... C"]]
"""The function `(parameters, head, inputs)` to a task's logits, `[B, C]` or `[B, T, V]`."""


def fisher_diagonal(logits: Logits) -> Callable[..., dict[str, Float[Array, "..."]]]:
    """Returns the function that computes the diagonal Fisher information of a model's parameters.

    The function is `(parameters, head, batches, names, samples, seed) -> {name: [*shape]}`:

        F = mean over x of E_{y ~ p(y | x)} (d log p(y | x) / d theta)^2

    Labels are the model's own, and none is read. For a classifier with `samples` 0 the expectation
    is taken over all classes. Otherwise so many labels are drawn for each example, for a language
    model a token at every position that the data predicts, whose log-probabilities add up.

    On the device are the sums for the names asked for, float32, and the gradient of one example.

    Args:
        logits: The model.
    """

    @functools.partial(jax.jit, donate_argnums=0, static_argnames="samples")
    def add(
        sums: dict[str, Float[Array, "..."]],
        parameters: Mapping[str, Array],
        head: PyTree[Array],
        batch: CalibrationBatch,
        key: Key[Array, ""],
        samples: int,
    ) -> dict[str, Float[Array, "..."]]:
        chosen = {name: parameters[name] for name in sums}

        def add_example(
            sums: dict[str, Array], example: tuple[CalibrationBatch, Key[Array, ""]]
        ) -> tuple[dict[str, Array], None]:
            (inputs, weight, labels, counted), example_key = example
            if counted is None and labels is not None and labels.ndim == 1:
                counted = labels != NOT_PREDICTED

            def log_probabilities(chosen: Mapping[str, Array]) -> Float[Array, "... C"]:
                one = jax.tree.map(lambda array: array[None], inputs)
                return log_softmax(logits({**parameters, **chosen}, head, one)[0])

            values, gradient_of = jax.vjp(log_probabilities, chosen)

            def add_square(
                sums: dict[str, Array], drawn: tuple[Float[Array, "... C"], Float[Array, ""]]
            ) -> tuple[dict[str, Array], None]:
                cotangent, share = drawn
                (gradient,) = gradient_of(cotangent)

                def squared(total: Array, slope: Array) -> Array:
                    return total + weight * share * jnp.square(slope.astype(jnp.float32))

                return jax.tree.map(squared, sums, gradient), None

            return jax.lax.scan(add_square, sums, _draws(values, counted, example_key, samples))

        keys = jax.random.split(key, len(batch.weights))
        return jax.lax.scan(add_example, sums, (batch, keys))[0]

    def compute(
        parameters: Mapping[str, Array],
        head: PyTree[Array],
        batches: Iterable[CalibrationBatch],
        names: Sequence[str],
        samples: int,
        seed: int,
    ) -> dict[str, Float[Array, "..."]]:
        sums = {name: jnp.zeros(parameters[name].shape, jnp.float32) for name in names}
        key, count = jax.random.key(seed), 0.0
        for number, batch in enumerate(batches):
            of_batch = jax.random.fold_in(key, number)
            sums = add(sums, parameters, head, batch, of_batch, samples)
            count += float(batch.weights.sum())
        return {name: total / count for name, total in sums.items()}

    return compute


def _draws(
    values: Float[Array, "... C"],
    counted: Bool[Array, " T"] | None,
    key: Key[Array, ""],
    samples: int,
) -> tuple[Float[Array, "S ... C"], Float[Array, " S"]]:
    """Returns labels as cotangents of the log-probabilities, and the share of each in the mean."""
    classes = values.shape[-1]
    if values.ndim == 1 and samples == 0:
        return jnp.eye(classes), jnp.exp(values)
    count = max(samples, 1)
    drawn = jax.random.categorical(key, values, shape=(count, *values.shape[:-1]))
    cotangents = jax.nn.one_hot(drawn, classes)
    if values.ndim == 2 and counted is not None:
        cotangents *= counted[..., None]
    return cotangents, jnp.full(count, 1 / count)


def mean_loss(logits: Logits) -> Callable[..., float]:
    """Returns the function that computes a model's mean loss on its data, in nats.

    The function is `(parameters, head, batches)`. The loss is the entropy of a classifier's
    prediction, or the mean of those of words or of labels, for which no label is read; or the mean
    cross-entropy of the tokens of a text.

    Args:
        logits: The model.
    """

    @jax.jit
    def of_batch(
        parameters: Mapping[str, Array], head: PyTree[Array], batch: CalibrationBatch
    ) -> Float[Array, ""]:
        values = log_softmax(logits(parameters, head, batch.inputs))
        if values.ndim == 2:
            losses = shannon_entropy(values)
        elif batch.counted is not None or batch.labels is None:
            losses = masked_mean(shannon_entropy(values), batch.counted)
        else:
            predicted = batch.labels != NOT_PREDICTED
            of_token = -pick(values, jnp.maximum(batch.labels, 0)) * predicted
            losses = of_token.sum(-1) / jnp.maximum(predicted.sum(-1), 1)
        return (losses * batch.weights).sum()

    def compute(
        parameters: Mapping[str, Array], head: PyTree[Array], batches: Iterable[CalibrationBatch]
    ) -> float:
        total, count = 0.0, 0.0
        for batch in batches:
            total += float(of_batch(parameters, head, batch))
            count += float(batch.weights.sum())
        return total / count

    return compute
