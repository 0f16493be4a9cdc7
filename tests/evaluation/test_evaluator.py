"""Scores of examples, by a backbone and heads that are plain functions."""

import logging
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adamerge_jax.data.arrays import ArrayExamples
from adamerge_jax.data.conversations import Tokens
from adamerge_jax.data.decoder_examples import DecoderExamples
from adamerge_jax.evaluation.evaluator import Evaluator
from adamerge_jax.models.layers import Outputs

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
        ends = [length - 1] if len(sequences) % 2 else []
        sequences.append(Tokens(ids.tolist(), predicted.tolist(), ends))
    examples = DecoderExamples(sequences, padding=0, max_length=64)
    runner = evaluator("loss", batch_size, from_tokens)
    scores = runner.example_scores({"table": jnp.asarray(table)}, "task", examples)
    log_probabilities = table - np.log(np.exp(table.astype(np.float64)).sum(1, keepdims=True))
    total = 0.0
    expected = {"token_accuracy": [], "answer_loss": []}
    for position, (ids, predicted, ends) in enumerate(sequences):
        ids, predicted = np.array(ids[:64]), np.array(predicted[:64])
        losses = -log_probabilities[ids[:-1], ids[1:]][predicted[1:]]
        assert scores.counts[position] == len(losses)
        assert scores.values[position] == pytest.approx(losses.sum(), rel=1e-5)
        total += losses.sum()
        likeliest = table.argmax(1)[ids[:-1]] == ids[1:]
        expected["token_accuracy"].append((likeliest[predicted[1:]].sum(), len(losses)))
        has_end = bool(ends) and ends[0] < 64
        on_answer = losses[:-1] if has_end else losses
        expected["answer_loss"].append((on_answer.sum(), len(on_answer)))
    assert scores.mean == pytest.approx(total / scores.counts.sum(), rel=1e-6)
    row = runner.row("base", {"table": jnp.asarray(table)}, {"task": examples}, "learned")
    assert row.tasks == {"task": scores.mean}
    assert (row.metric, row.kind) == ("loss", "learned")
    np.testing.assert_array_equal(row.examples["task"].values, scores.values)
    assert [further.metric for further in row.further] == list(expected)
    for further in row.further:
        values, counts = np.transpose(expected[further.metric])
        np.testing.assert_allclose(further.examples["task"].values, values, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(further.examples["task"].counts, counts)
        assert (further.method, further.kind) == ("base", "learned")


def test_examples_without_ends_have_no_loss_apart_from_them():
    table = np.eye(VOCABULARY, dtype=np.float32)
    examples = DecoderExamples([Tokens([1, 2, 2], [True] * 3)], padding=0, max_length=8)
    measures = evaluator("loss", 1, from_tokens).measures({"table": table}, "task", examples)
    assert list(measures) == ["loss", "token_accuracy"]
    assert measures["token_accuracy"].mean == 0.5


def test_tokens_of_logits_that_are_no_numbers_are_wrong():
    table = np.full((VOCABULARY, VOCABULARY), np.nan, np.float32)
    examples = DecoderExamples([Tokens([1, 0, 0], [True] * 3)], padding=0, max_length=8)
    measures = evaluator("loss", 1, from_tokens).measures({"table": table}, "task", examples)
    assert measures["token_accuracy"].mean == 0


def test_heads_of_one_backbone_are_scored_in_one_pass():
    generator = np.random.default_rng(0)
    examples = ArrayExamples(
        {"logits": generator.normal(size=(23, 4)).astype(np.float32)},
        generator.integers(4, size=23),
    )
    passes = []

    def backbone(parameters, inputs, *, hidden_states=False):
        jax.debug.callback(lambda: passes.append(1))
        return as_they_are(parameters, inputs)

    class Shift:
        """A head that moves every class on by one where its parameter says so."""

        shapes: Mapping[str, object] = {"by": ()}

        def __call__(self, parameters, outputs):
            return jnp.roll(outputs.last_hidden_state, parameters["by"], axis=-1)

    plain = Evaluator(backbone, {"task": Shift()}, {"task": {"by": 0}}, 5)
    moved = plain.with_heads({"task": {"by": 1}})
    kinds = {"plain": (plain, "baseline"), "moved": (moved, "heads")}
    rows = plain.rows_with_heads({}, {"task": examples}, kinds)
    jax.effects_barrier()
    assert len(passes) == 5
    assert [row.kind for row in rows] == ["baseline", "heads"]
    for row, evaluated in zip(rows, (plain, moved), strict=True):
        alone = evaluated.example_scores({}, "task", examples)
        np.testing.assert_array_equal(row.examples["task"].values, alone.values)
    assert rows[0].tasks != rows[1].tasks
