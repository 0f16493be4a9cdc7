"""Packed texts have the outputs and gradients of padded ones, for every family that takes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import (
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
)

from adamerge_jax.data.packing import Packing
from adamerge_jax.models import family_of
from adamerge_jax.models.embedding_form import EmbeddingForm
from adamerge_jax.models.network import Network
from adamerge_jax.models.token_rows import SLOTS
from tests.references import SPECIAL_TOKENS

SIZES = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40
)
CONFIGS = {
    "distilbert": DistilBertConfig(
        dim=16, hidden_dim=24, n_layers=2, n_heads=2, vocab_size=40, max_position_embeddings=12
    ),
    "bert": BertConfig(**SIZES, max_position_embeddings=12),
    "electra": ElectraConfig(**SIZES, embedding_size=8, max_position_embeddings=12),
    "mpnet": MPNetConfig(**SIZES, max_position_embeddings=14),
    "roberta": RobertaConfig(**SIZES, max_position_embeddings=14, pad_token_id=1),
    "deberta-v2": DebertaV2Config(
        **SIZES,
        max_position_embeddings=12,
        relative_attention=True,
        position_buckets=4,
        pos_att_type=["p2c", "c2p"],
    ),
    "modernbert": ModernBertConfig(
        **SIZES,
        max_position_embeddings=12,
        local_attention=4,
        global_attn_every_n_layers=2,
        **dict.fromkeys(SPECIAL_TOKENS, 1),
    ),
}
LENGTHS = np.array([3, 12, 1, 5, 4, 7])


def batch_of(backbone: Network) -> tuple[dict, dict, dict]:
    """Texts, the same packed, and parameters of a backbone."""
    generator = np.random.default_rng(0)
    mask = (np.arange(12) < LENGTHS[:, None]).astype(np.int32)
    inputs = {
        "input_ids": np.where(mask, generator.integers(5, 40, mask.shape), 1).astype(np.int32),
        "attention_mask": mask,
    }
    packed = Packing(12, 3).pack(inputs)
    assert packed[SLOTS].shape == (3, 12)
    parameters = {
        name: jnp.asarray(0.3 * generator.normal(size=leaf.shape), jnp.float32)
        for name, leaf in backbone.shapes.items()
    }
    return inputs, packed, parameters


@pytest.mark.parametrize(
    ("name", "rematerialize"), [("bert", "layer"), *((name, "nothing") for name in CONFIGS)]
)
def test_outputs_and_gradients_are_those_of_padded_texts(name, rematerialize):
    family = family_of(CONFIGS[name])
    assert family.packs
    backbone = family.build_backbone(CONFIGS[name], rematerialize)
    inputs, packed, parameters = batch_of(backbone)
    mask = inputs["attention_mask"]

    def loss(parameters, inputs):
        outputs = backbone(parameters, inputs, hidden_states=True)
        states = outputs.hidden_states * mask[:, :, None]
        last = outputs.last_hidden_state * mask[:, :, None]
        total = jnp.square(outputs.pooled).sum() + jnp.square(last).sum() + jnp.sin(states).sum()
        return total, (outputs.pooled, last, states)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, expected), expected_gradient = run(parameters, inputs)
    (_, found), gradient = run(parameters, packed)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
    for parameter, of_padded in expected_gradient.items():
        scale = max(1, float(jnp.abs(of_padded).max()))
        np.testing.assert_allclose(gradient[parameter], of_padded, atol=2e-5 * scale)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_embeddings_are_those_of_padded_texts(pooling):
    config = CONFIGS["bert"]
    family = family_of(config, embeds=EmbeddingForm(pooling=pooling, normalised=True))
    backbone = family.build_backbone(config, "nothing")
    inputs, packed, parameters = batch_of(backbone)
    run = jax.jit(backbone)
    expected, found = run(parameters, inputs).pooled, run(parameters, packed).pooled
    assert found.shape == (len(LENGTHS), 1, 16)
    np.testing.assert_allclose(found, expected, atol=2e-6)
