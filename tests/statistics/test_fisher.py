"""Fisher information and losses of language models: positions that count, and drawn tokens."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adamerge_jax.objectives.targets import NOT_PREDICTED
from adamerge_jax.statistics import CalibrationBatch, Statistics, TaskData

TOKENS, WIDTH, EXAMPLES, LENGTH = 6, 4, 3, 5


@pytest.fixture
def texts() -> tuple[Statistics, dict[str, Any], CalibrationBatch]:
    """A language model of one layer, and a batch whose last example does not count."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, TOKENS, (EXAMPLES, LENGTH))
    labels[:, :2] = labels[1, 3:] = NOT_PREDICTED
    x = generator.normal(size=(EXAMPLES, LENGTH, WIDTH)).astype(np.float32)
    batch = CalibrationBatch({"x": x}, np.array([1, 1, 0], np.float32), labels)

    def logits(parameters: Mapping[str, Any], head: Any, inputs: Mapping[str, Any]) -> Any:
        return inputs["x"] @ parameters["weight"].T

    def batches() -> Iterator[CalibrationBatch]:
        yield batch

    task = TaskData(batches, 1, logits, ())
    weight = generator.normal(size=(TOKENS, WIDTH)).astype(np.float32)
    return Statistics(lambda p, i: None, [task]), {"weight": jnp.asarray(weight)}, batch


def shares_of(parameters: Mapping[str, Any], batch: CalibrationBatch) -> np.ndarray:
    logits = np.asarray(batch.inputs["x"], np.float64) @ np.asarray(parameters["weight"]).T
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


@pytest.mark.parametrize("samples", [0, 2])
def test_drawn_tokens_add_up_over_the_positions_that_count(texts: Any, samples: int):
    statistics, parameters, batch = texts
    found = statistics.fisher(0, parameters, ["weight"], samples=samples, seed=3)["weight"]
    shares, expected = shares_of(parameters, batch), np.zeros((TOKENS, WIDTH))
    keys = jax.random.split(jax.random.fold_in(jax.random.key(3), 0), EXAMPLES)
    count = max(samples, 1)
    for example in range(2):
        drawn = jax.random.categorical(
            keys[example], np.log(shares[example]).astype(np.float32), shape=(count, LENGTH)
        )
        counted = (batch.labels[example] != NOT_PREDICTED)[:, None]
        for tokens in np.asarray(drawn):
            slopes = (np.eye(TOKENS)[tokens] - shares[example]) * counted
            expected += (slopes.T @ batch.inputs["x"][example]) ** 2 / (2 * count)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_loss_is_the_mean_over_predicted_tokens(texts: Any):
    statistics, parameters, batch = texts
    shares, losses = shares_of(parameters, batch), []
    for example in range(2):
        counted = np.flatnonzero(batch.labels[example] != NOT_PREDICTED)
        tokens = batch.labels[example][counted]
        losses.append(-np.log(shares[example][counted, tokens]).mean())
    np.testing.assert_allclose(statistics.loss(0, parameters), np.mean(losses), atol=1e-5)


@pytest.mark.parametrize("of_words", [True, False])
def test_words_and_labels_are_as_sure_as_their_predictions(texts: Any, of_words: bool):
    """Of words those count that are classified, of labels all; no label is read."""
    _, parameters, batch = texts
    counted = batch.labels != NOT_PREDICTED if of_words else None
    unlabeled = batch._replace(labels=None, counted=counted)

    def logits(parameters: Mapping[str, Any], head: Any, inputs: Mapping[str, Any]) -> Any:
        return inputs["x"] @ parameters["weight"].T

    statistics = Statistics(lambda p, i: None, [TaskData(lambda: [unlabeled], 1, logits, ())])
    shares = shares_of(parameters, batch)[:2]
    entropies = -(shares * np.log(shares)).sum(-1)
    is_read = np.ones(entropies.shape, bool) if counted is None else counted[:2]
    expected = np.mean([row[mask].mean() for row, mask in zip(entropies, is_read, strict=True)])
    assert statistics.loss(0, parameters) == pytest.approx(expected, rel=1e-5)
    of_all = statistics.fisher(0, parameters, ["weight"], samples=1, seed=3)["weight"]
    labelled = Statistics(lambda p, i: None, [TaskData(lambda: [batch], 1, logits, ())])
    of_counted = labelled.fisher(0, parameters, ["weight"], samples=1, seed=3)["weight"]
    assert np.allclose(of_all, of_counted) == of_words
