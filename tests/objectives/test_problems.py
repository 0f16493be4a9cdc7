"""Objectives of heads on words, of labels and of numbers, against PyTorch's own losses."""

import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional

from adamerge_jax.objectives import (
    NOT_PREDICTED,
    Targets,
    TaskOutputs,
    cross_entropy,
    entropy,
    logit_alignment,
    output_alignment,
    squared_error,
)

GENERATOR = np.random.default_rng(0)
B, T, C = 3, 5, 4


def normal(*shape):
    return GENERATOR.normal(size=shape).astype(np.float32)


def test_words_count_at_their_first_tokens():
    logits, expert_logits = normal(B, T, C), normal(B, T, C)
    labels = GENERATOR.integers(C, size=(B, T))
    labels[0, 2:], labels[1, 0], labels[2, :4] = NOT_PREDICTED, NOT_PREDICTED, NOT_PREDICTED
    counted = labels != NOT_PREDICTED
    outputs = TaskOutputs(jnp.array(logits))
    unlabeled = Targets(expert_logits=jnp.array(expert_logits), counted=jnp.array(counted))
    labelled = Targets(labels=jnp.array(labels), counted=jnp.array(counted))
    alignment = logit_alignment(form="kl", top_tokens=None).value(outputs, unlabeled)
    losses, entropies = (
        objective.value(outputs, targets)
        for objective, targets in ((cross_entropy(), labelled), (entropy(), unlabeled))
    )
    for row in range(B):
        ours, experts = (torch.tensor(x[row][counted[row]]) for x in (logits, expert_logits))
        divergence = functional.kl_div(
            functional.log_softmax(ours, -1), functional.softmax(experts, -1), reduction="none"
        )
        np.testing.assert_allclose(alignment[row], divergence.sum(-1).mean(), rtol=1e-5)
        # The loss of `transformers`, which ignores -100.
        loss = functional.cross_entropy(torch.tensor(logits[row]), torch.tensor(labels[row]))
        np.testing.assert_allclose(losses[row], loss, rtol=1e-5)
        of_words = torch.distributions.Categorical(logits=ours).entropy().mean()
        np.testing.assert_allclose(entropies[row], of_words, rtol=1e-5)


def test_labels_are_each_a_choice_of_two():
    logits, expert_logits = normal(B, C), normal(B, C)
    labels = GENERATOR.integers(2, size=(B, C))

    def pairs(logits):
        return jnp.stack([jnp.zeros_like(logits), logits], -1)

    outputs = TaskOutputs(pairs(logits))
    unlabeled = Targets(expert_logits=pairs(expert_logits))
    alignment = logit_alignment(form="kl", top_tokens=None).value(outputs, unlabeled)
    entropies = entropy().value(outputs, unlabeled)
    losses = cross_entropy().value(outputs, Targets(labels=jnp.array(labels)))
    ours, experts = (
        torch.distributions.Bernoulli(logits=torch.tensor(x)) for x in (logits, expert_logits)
    )
    divergence = torch.distributions.kl_divergence(experts, ours).mean(-1)
    np.testing.assert_allclose(alignment, divergence, rtol=1e-5)
    np.testing.assert_allclose(entropies, ours.entropy().mean(-1), rtol=1e-5)
    for row in range(B):
        loss = functional.binary_cross_entropy_with_logits(
            torch.tensor(logits[row]), torch.tensor(labels[row], dtype=torch.float32)
        )
        np.testing.assert_allclose(losses[row], loss, rtol=1e-5)


def test_numbers():
    numbers, expert, labels = normal(B, 2), normal(B, 2), normal(B, 2)
    spread = np.tile(np.array([0.5, 3.0], np.float32), (B, 1))
    outputs = TaskOutputs(jnp.array(numbers))
    targets = Targets(expert_logits=jnp.array(expert), expert_spread=jnp.array(spread))
    expected = np.square((numbers - expert) / spread).mean(-1)
    np.testing.assert_allclose(output_alignment().value(outputs, targets), expected, rtol=1e-6)
    losses = squared_error().value(outputs, Targets(labels=jnp.array(labels)))
    for row in range(B):
        loss = functional.mse_loss(torch.tensor(numbers[row]), torch.tensor(labels[row]))
        np.testing.assert_allclose(losses[row], loss, rtol=1e-6)
    assert output_alignment().value(TaskOutputs(targets.expert_logits), targets).max() == 0
