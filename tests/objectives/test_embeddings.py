"""Objectives on embeddings, against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adamerge_jax.errors import InputError
from adamerge_jax.objectives import Targets, TaskOutputs, contrastive, embedding_alignment

GENERATOR = np.random.default_rng(0)
MERGED, EXPERT = GENERATOR.normal(size=(2, 6, 2, 5)).astype(np.float32)


def outputs(embeddings: np.ndarray) -> TaskOutputs:
    return TaskOutputs(jnp.zeros((len(embeddings), 1)), embeddings=jnp.asarray(embeddings))


def unit(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) / np.linalg.norm(x, axis=-1, keepdims=True)


def test_alignment() -> None:
    targets = Targets(expert_embeddings=EXPERT)
    cosine = embedding_alignment().value(outputs(MERGED), targets)
    expected = 1 - (unit(MERGED) * unit(EXPERT)).sum(-1).mean(-1)
    np.testing.assert_allclose(cosine, expected, rtol=1e-5, atol=1e-6)
    squared = embedding_alignment("squared").value(outputs(MERGED), targets)
    expected = ((MERGED.astype(np.float64) - EXPERT) ** 2).sum(-1).mean(-1)
    np.testing.assert_allclose(squared, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="distance is 'dot'"):
        embedding_alignment("dot")


def test_an_embedding_of_zeros_has_a_gradient() -> None:
    def total(embeddings: jax.Array) -> jax.Array:
        targets = Targets(expert_embeddings=EXPERT)
        return embedding_alignment().value(outputs(embeddings), targets).sum()

    assert np.isfinite(jax.jit(jax.grad(total))(jnp.zeros_like(MERGED))).all()


def test_contrastive() -> None:
    value = contrastive(0.1).value(outputs(MERGED), Targets())
    first, second = unit(MERGED[:, 0]), unit(MERGED[:, 1])
    weights = np.exp(first @ second.T / 0.1)
    expected = -np.log(np.diag(weights) / weights.sum(-1))
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    assert contrastive().target_spec.whole_batch
    with pytest.raises(ValueError, match="temperature is 0"):
        contrastive(0)


def test_a_second_text_of_several_pairs_counts_once() -> None:
    rows = np.array([0, 1, 2, 0, 3, 1])
    embeddings, partners = MERGED[rows], np.array([5, 7, 5, 5, 2, 7])
    embeddings[2, 1] = embeddings[0, 1]  # the partner of another first text, too
    first, second = unit(embeddings[:, 0]), unit(embeddings[:, 1])
    weights = np.exp(first @ second.T / 0.1)
    expected = [
        -np.log(row[i] / (row[i] + sum(row[j] for j in (0, 1, 4) if partners[j] != partners[i])))
        for i, row in enumerate(weights)
    ]

    def value(embeddings: jax.Array) -> jax.Array:
        return contrastive(0.1).value(outputs(embeddings), Targets(partners=partners))

    np.testing.assert_allclose(value(embeddings), expected, rtol=1e-5, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda embeddings: value(embeddings).sum()))(embeddings)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    # Different texts stay negatives of each other, however alike their embeddings are.
    alike = np.broadcast_to(embeddings[0], embeddings.shape)
    np.testing.assert_allclose(value(alike), np.log(3), rtol=1e-5)


def test_what_is_missing_is_named() -> None:
    spec = embedding_alignment().target_spec | contrastive().target_spec
    for given, targets, words in (
        (TaskOutputs(jnp.zeros((6, 1))), Targets(expert_embeddings=EXPERT), "sentence embedders"),
        (outputs(MERGED), Targets(), "the expert's embeddings"),
        (outputs(MERGED[:, :1]), Targets(expert_embeddings=EXPERT), "two texts"),
    ):
        with pytest.raises(InputError, match=words):
            spec.require_given(given, targets)
    spec.require_given(outputs(MERGED), Targets(expert_embeddings=EXPERT))
