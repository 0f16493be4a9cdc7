"""Scores of examples, by a backbone and heads that are plain functions."""

import logging
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import pytest

from adamerge_jax.data.arrays import ArrayExamples
from adamerge_jax.data.language import DecoderExamples, Tokens
from adamerge_jax.models.layers import Outputs
from adamerge_jax.pipeline.evaluate import Evaluator

VOCABULARY = 11


class Head:
    """A head whose logits are what the backbone gives, with no parameter of its own."""

    shapes: Mapping[str, object] = {}

    def __call__(self, parameters, outputs):
        return outputs.last_hidden_state


def evaluator(metric: str, batch_size: int, backbone) -> Evaluator:
    return Evaluator(backbone, {"task": Head()}, {"task": {}}, batch_size, metric)


def as_they_are(parameters, inputs, *, hidden_states=False):
    return Outputs(None, inputs["logits"], None)


def from_tokens(parameters, inputs, *, hidden_states=False):
    """Logits of every token, that depend on it alone."""
    return Outputs(None, parameters["table"][inputs["input_ids"]], None)


def test_each_example_is_right_or_wrong():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(23, 4)).astype(np.float32)
    labels = generator.integers(4, size=23)
    scores = evaluator("accuracy", 5, as_they_are).example_scores(
        {}, "task", ArrayExamples({"logits": logits}, labels)
    )
    np.testing.assert_array_equal(scores.values, logits.argmax(1) == labels)
    np.testing.assert_array_equal(scores.counts, np.ones(23))
    assert scores.mean == np.mean(logits.argmax(1) == labels)


def test_logits_that_are_no_numbers_are_wrong(caplog):
    logits = np.eye(4, dtype=np.float32)
    logits[[0, 3]] = np.nan
    logits[2, 0] = -np.inf  # which can be compared
    examples = ArrayExamples({"logits": logits}, np.array([0, 1, 2, 0]))
    with caplog.at_level(logging.WARNING):
        scores = evaluator("accuracy", 4, as_they_are).example_scores({}, "task", examples)
    np.testing.assert_array_equal(scores.values, [0, 1, 1, 0])
    assert "task 'task': the logits of 2 of 4 examples are NaN" in caplog.text


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_losses_of_sequences_are_in_their_order(batch_size):
    generator = np.random.default_rng(1)
    table = generator.normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)
    sequences = []
    for length in generator.integers(2, 70, size=13):  # of several padded lengths
        predicted = generator.random(length) < 0.6
        predicted[-1] = True
        ids = generator.integers(VOCABULARY, size=length)
        sequences.append(Tokens(ids.tolist(), predicted.tolist()))
    examples = DecoderExamples(sequences, padding=0, max_length=64)
    runner = evaluator("loss", batch_size, from_tokens)
    scores = runner.example_scores({"table": jnp.asarray(table)}, "task", examples)
    log_probabilities = table - np.log(np.exp(table.astype(np.float64)).sum(1, keepdims=True))
    total = 0.0
    for position, (ids, predicted) in enumerate(sequences):
        ids, predicted = ids[:64], predicted[:64]
        losses = -log_probabilities[ids[:-1], ids[1:]][predicted[1:]]
        assert scores.counts[position] == len(losses)
        assert scores.values[position] == pytest.approx(losses.sum(), rel=1e-5)
        total += losses.sum()
    assert scores.mean == pytest.approx(total / scores.counts.sum(), rel=1e-6)
    row = runner.row("base", {"table": jnp.asarray(table)}, {"task": examples}, "learned")
    assert row.tasks == {"task": scores.mean}
    assert (row.metric, row.kind) == ("loss", "learned")
    np.testing.assert_array_equal(row.examples["task"].values, scores.values)
