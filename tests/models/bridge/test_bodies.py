"""Models whose own class is called after a part of a larger one, and models without a body."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig, UMT5Config

from adamerge_jax.errors import InputError
from adamerge_jax.models.bridge.family import bridged_family
from adamerge_jax.models.family import complete_head
from tests.references import randomise, saved_parameters


def test_the_body_of_a_text_model_of_llama_4(tmp_path):
    config = Llama4TextConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        intermediate_size_mlp=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=2,
        max_position_embeddings=64,
        **dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id"], 0),
    )
    model = randomise(Llama4ForCausalLM(config))
    tensors = saved_parameters(model, tmp_path)
    family = bridged_family(config, "Llama4ForCausalLM")
    backbone, head = family.build_backbone(config, "nothing"), family.build_head(config)
    tokens = np.arange(1, 15).reshape(2, 7)
    inputs = {"input_ids": jnp.array(tokens), "attention_mask": jnp.ones_like(tokens)}

    @jax.jit
    def run(parameters, inputs):
        return head(complete_head(head, {}, parameters), backbone(parameters, inputs))

    ours = run({name: jnp.array(tensors[name]) for name in backbone.shapes}, inputs)
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_model_without_a_body_is_refused_in_words():
    config = UMT5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    with pytest.raises(InputError, match="a UMT5ForConditionalGeneration has no part that ends"):
        bridged_family(config, "UMT5ForConditionalGeneration")
