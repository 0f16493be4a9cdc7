"""Pooling, against sentence-transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.modules.pooling import Pooling

from adamerge_jax.models.embedder import pool

MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1]])


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_pooling_is_that_of_sentence_transformers(pooling: str) -> None:
    hidden = np.random.default_rng(0).normal(size=(4, 4, 8)).astype(np.float32)
    features = {
        "token_embeddings": torch.tensor(hidden),
        "attention_mask": torch.tensor(MASK),
    }
    theirs = Pooling(8, pooling)(features)["sentence_embedding"].numpy()
    ours = pool(jnp.asarray(hidden), jnp.asarray(MASK), pooling)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
