"""An architecture like Llama is one file and one line in the registry."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import LlamaConfig

from adamerge_jax import models
from adamerge_jax.models import family_of
from adamerge_jax.models.family import complete_head

PEBBLE = '''
"""Pebble: a Llama that normalises the queries and keys of each head."""

from adamerge_jax.models.decoder_layers import Attention, PreNormLayer, RMSNorm, decoder_family


class PebbleLayer(PreNormLayer):
    def __init__(self, config):
        super().__init__(config, Attention(config, norm=RMSNorm))


FAMILY = decoder_family(PebbleLayer)
'''


class PebbleConfig(LlamaConfig):
    model_type = "pebble"


def test_an_architecture_is_a_file_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pebble.py").write_text(PEBBLE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(models.ARCHITECTURES, "pebble", "pebble")

    config = PebbleConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=10,
        pad_token_id=0,
    )
    family = family_of(config)
    backbone, head = family.build_backbone(config), family.build_head(config)
    assert backbone.shapes["model.layers.*.self_attn.q_norm.weight"].shape == (2, 4)

    generator = np.random.default_rng(0)
    parameters = {
        name: jnp.asarray(generator.normal(size=leaf.shape), jnp.float32)
        for name, leaf in backbone.shapes.items()
    }
    batch = {"input_ids": jnp.array([[3, 1, 4, 1, 5]])}
    logits = head(complete_head(head, {}, parameters), backbone(parameters, batch))
    assert logits.shape == (1, 5, 20) and jnp.isfinite(logits).all()
    # Causal: a token has no influence on what comes before it.
    changed = {"input_ids": batch["input_ids"].at[0, 3].set(2)}
    again = head(complete_head(head, {}, parameters), backbone(parameters, changed))
    np.testing.assert_array_equal(logits[0, :3], again[0, :3])
    assert not np.array_equal(logits[0, 3:], again[0, 3:])
