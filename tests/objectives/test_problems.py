"""Objectives of heads on words, against PyTorch's own losses."""

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
