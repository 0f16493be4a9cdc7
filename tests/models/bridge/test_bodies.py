"""Models that are divided into a body and a head in other ways than most."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    Gemma3Config,
    Llama4ForCausalLM,
    Llama4TextConfig,
    PreTrainedModel,
    ProphetNetConfig,
    SiglipConfig,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from adamerge_jax.errors import InputError
from adamerge_jax.models.bridge.family import BridgedFamily, bridged_family
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
    tokens = np.arange(1, 15).reshape(2, 7)
    require_logits(Llama4ForCausalLM(config), {"input_ids": tokens}, tmp_path)


SMALL_T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}


def test_a_model_without_a_body_is_run_up_to_its_output_layer(tmp_path):
    model = UMT5ForConditionalGeneration(UMT5Config(**SMALL_T5))
    tokens = np.arange(2, 16).reshape(2, 7)
    inputs = {"input_ids": tokens, "decoder_input_ids": tokens[:, :4]}
    family = require_logits(model, inputs, tmp_path)
    assert family.tied(model.config) == ("shared.weight",)


def test_a_classifier_that_looks_for_the_end_of_a_text_is_refused_in_words():
    config = UMT5Config(**SMALL_T5)
    message = r"depends on values, .* compiles it \(modeling_umt5.py, line \d+\); merges without"
    with pytest.raises(InputError, match=message):
        bridged_family(config, "UMT5ForSequenceClassification")


def test_an_output_that_is_not_the_last_layers_is_refused():
    config = ProphetNetConfig(
        **{"vocab_size": 40, "hidden_size": 16, "num_encoder_layers": 1, "num_decoder_layers": 1},
        **dict.fromkeys(["num_encoder_attention_heads", "num_decoder_attention_heads"], 2),
    )
    with pytest.raises(InputError, match="cannot run in JAX"):
        bridged_family(config, "ProphetNetForConditionalGeneration")


def test_the_one_part_of_a_classifier_is_its_body():
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        vision_config=vision | {"intermediate_size": 24, "image_size": 8, "patch_size": 4}
    )
    family = bridged_family(config, "SiglipForImageClassification")
    assert set(family.build_head(config).shapes) == {"classifier.weight", "classifier.bias"}
    names = family.build_backbone(config).shapes
    assert all(name.startswith("vision_model.") for name in names)


def test_a_model_whose_images_cannot_be_read_is_learned_from_texts():
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text | {"vocab_size": 40, "intermediate_size": 24, "num_key_value_heads": 1},
        vision_config=vision | {"intermediate_size": 24, "image_size": 8, "patch_size": 4},
        mm_tokens_per_image=9,  # of 4 patches
    )
    family = bridged_family(config, "Gemma3ForConditionalGeneration")
    assert family.images is None and family.inputs == ("input_ids", "attention_mask")
    assert "modulo by zero" in family.blind


def require_logits(
    model: PreTrainedModel, tokens: dict[str, np.ndarray], folder: Path
) -> BridgedFamily:
    """Compares a language model's logits with PyTorch's, and returns its family."""
    tensors = saved_parameters(randomise(model), folder)
    family = bridged_family(model.config, type(model).__name__)
    backbone, head = family.build_backbone(model.config, "nothing"), family.build_head(model.config)
    inputs = {name: jnp.array(array) for name, array in tokens.items()}

    @jax.jit
    def run(parameters, inputs):
        return head(complete_head(head, {}, parameters), backbone(parameters, inputs))

    ours = run({name: jnp.array(tensors[name]) for name in backbone.shapes}, inputs)
    with torch.no_grad():
        theirs = model(**{name: torch.tensor(array) for name, array in tokens.items()})
    np.testing.assert_allclose(ours, theirs.logits.numpy(), atol=1e-4)
    return family
