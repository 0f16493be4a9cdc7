"""Pooling and whole embedders, against sentence-transformers and `transformers`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from sentence_transformers.sentence_transformer.modules.pooling import Pooling

from adamerge_jax.errors import InputError
from adamerge_jax.models import family_of
from adamerge_jax.models.bridge.family import bridged_encoder
from adamerge_jax.models.embedder import pool
from adamerge_jax.models.embedding_form import EmbeddingForm
from tests.references import parameters_of, randomise

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


SIZES = dict(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=12,
    pad_token_id=0,
)


@pytest.mark.parametrize(
    ("kind", "further"),
    [
        ("Bert", {}),
        ("Qwen3", {"num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False}),
        ("MPNet", {}),
        ("RoFormer", {}),  # by its PyTorch forward
    ],
)
def test_texts_and_pairs_are_embedded_as_by_transformers(kind: str, further: Any) -> None:
    config = getattr(transformers, f"{kind}Config")(**SIZES | further)
    model = randomise(getattr(transformers, f"{kind}Model")(config)).eval()
    token_ids = np.random.default_rng(0).integers(5, 40, (3, 2, 10))
    mask = np.ones_like(token_ids)
    mask[0, 0, 6:] = mask[2, 1, 3:] = 0
    token_ids[mask == 0] = 0
    flat = [torch.tensor(array.reshape(6, 10)) for array in (token_ids, mask)]
    with torch.no_grad():
        hidden = model(input_ids=flat[0], attention_mask=flat[1]).last_hidden_state
    features = {"token_embeddings": hidden, "attention_mask": flat[1]}
    expected = torch.nn.functional.normalize(Pooling(16, "mean")(features)["sentence_embedding"])

    family = family_of(config, embeds=EmbeddingForm("mean", True))
    network = family.build_backbone(config)
    assert not any("pooler" in name or "lm_head" in name for name in network.shapes)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    state |= {family.prefixes[0] + name: array for name, array in state.items()}
    parameters = jax.tree.map(jnp.asarray, parameters_of(network, state))
    inputs = {"input_ids": jnp.asarray(token_ids), "attention_mask": jnp.asarray(mask)}
    run = jax.jit(network)
    outputs = run(parameters, inputs)
    assert outputs.last_hidden_state.shape == (3, 20, 16)
    pairs = outputs.pooled
    # Two implementations in float32 of vectors of length 1.
    np.testing.assert_allclose(pairs.reshape(6, 16), expected, atol=1e-5)
    if family.bridged:
        return  # compiled once more it takes seconds
    singles = run(parameters, {name: array[:, 0] for name, array in inputs.items()}).pooled
    np.testing.assert_allclose(singles[:, 0], pairs[:, 0], atol=1e-6)


def test_models_of_two_stacks_are_refused() -> None:
    with pytest.raises(InputError, match="a decoder behind an encoder"):
        family_of(transformers.T5Config(), embeds=EmbeddingForm("mean", True))


def test_a_model_that_reads_no_texts_is_refused() -> None:
    config = transformers.ConvNextConfig(hidden_sizes=[4, 4, 4, 4], depths=[1, 1, 1, 1])
    with pytest.raises(InputError, match="ConvNextModel reads no input_ids"):
        bridged_encoder(config)
