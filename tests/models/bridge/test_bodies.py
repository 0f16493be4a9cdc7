"""Models that are divided into a body and a head in other ways than most."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers import (
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    Florence2Config,
    Gemma3Config,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LongformerConfig,
    MetaClip2Config,
    PreTrainedModel,
    ProphetNetConfig,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from adamerge_jax.errors import InputError
from adamerge_jax.models import family_of
from adamerge_jax.models.bridge.body import NotDividedError
from adamerge_jax.models.bridge.family import BridgedFamily, _told, bridged_family
from adamerge_jax.models.family import complete_head
from adamerge_jax.models.layers import Outputs
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


def test_a_language_model_of_an_encoder_that_has_a_family_here(tmp_path):
    """A BERT that sees earlier tokens alone."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**sizes, vocab_size=40, intermediate_size=24, is_decoder=True)
    model = BertLMHeadModel(config)
    family = family_of(config, type(model).__name__)
    assert family.bridged and family.language
    require_logits(model, {"input_ids": np.arange(1, 15).reshape(2, 7)}, tmp_path)


SMALL_T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}


def test_a_model_without_a_body_is_run_up_to_its_output_layer(tmp_path):
    model = UMT5ForConditionalGeneration(UMT5Config(**SMALL_T5))
    tokens = np.arange(2, 16).reshape(2, 7)
    inputs = {"input_ids": tokens, "decoder_input_ids": tokens[:, :4]}
    family = require_logits(model, inputs, tmp_path)
    assert family.tied(model.config) == ("shared.weight",)


@pytest.mark.parametrize("name", ["Bart", "UMT5"])
def test_a_classifier_reads_the_last_end_of_a_text(name, tmp_path):
    """Its texts have one or more end tokens, and padding behind them."""
    layers = {f"{part}_layers": 1 for part in ("encoder", "decoder")}
    heads = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    widths = {f"{part}_ffn_dim": 24 for part in ("encoder", "decoder")}
    small_bart = {"vocab_size": 40, "d_model": 16, "max_position_embeddings": 24}
    config = {
        "Bart": lambda: BartConfig(**small_bart, **layers, **heads, **widths, num_labels=3),
        "UMT5": lambda: UMT5Config(**SMALL_T5, num_labels=3, decoder_start_token_id=0),
    }[name]()
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    end, padding = config.eos_token_id, config.pad_token_id
    tokens = np.array([[5, 6, end, 7, 8, end, padding], [9, 8, 7, end, 5, 4, end]])
    inputs = {"input_ids": tokens, "attention_mask": np.int64(tokens != padding)}
    inputs["attention_mask"][1] = 1
    family = require_logits(model, inputs, tmp_path)
    assert family.last_layer.weight == "classification_head.out_proj.weight"
    head = family.build_head(config)
    parameters = {name: jnp.ones(leaf.shape) for name, leaf in head.shapes.items()}
    tokens = {"input_ids": jnp.array([[5, 6], [7, end]])}
    logits = head(parameters, Outputs(None, jnp.ones((2, 2, 16)), None, inputs=tokens))
    assert np.isnan(logits[0]).all() and np.isfinite(logits[1]).all()


def test_what_depends_on_values_is_refused_in_words():
    config = LongformerConfig(
        **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "attention_window": [4]},
        **{"num_hidden_layers": 1, "num_attention_heads": 2},
    )
    message = r"\(modeling_longformer.py, line \d+\); merges without"
    with pytest.raises(InputError, match=message):
        bridged_family(config, "LongformerForSequenceClassification")


def test_an_output_that_is_not_the_last_layers_is_refused():
    config = ProphetNetConfig(
        **{"vocab_size": 40, "hidden_size": 16, "num_encoder_layers": 1, "num_decoder_layers": 1},
        **dict.fromkeys(["num_encoder_attention_heads", "num_decoder_attention_heads"], 2),
    )
    with pytest.raises(InputError, match="cannot run in JAX"):
        bridged_family(config, "ProphetNetForConditionalGeneration")


def test_the_one_part_of_a_classifier_is_its_body():
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MetaClip2Config(
        vision_config=vision | {"intermediate_size": 24, "image_size": 8, "patch_size": 4}
    )
    family = bridged_family(config, "MetaClip2ForImageClassification")
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


def test_the_first_reason_is_told():
    """The second way of dividing a model fails otherwise where the first one could not run."""
    divided, first, second = (InputError(text) for text in ("divided", "first", "second"))
    divided.__cause__ = NotDividedError("divided")
    assert _told([divided, first, second]) is first
    assert _told([divided]) is divided


def test_an_encoder_decoder_that_reads_images_is_learned_from_texts():
    text = {"vocab_size": 40, "d_model": 16, "max_position_embeddings": 24}
    for part in ("encoder", "decoder"):
        text |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 24}
    vision = {"depths": [1] * 4, "embed_dim": [8] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4}
    config = Florence2Config(
        text_config={"model_type": "bart", **text},
        vision_config={**vision, "projection_dim": 16},
        image_token_id=39,
        is_encoder_decoder=True,
    )
    family = bridged_family(config, "Florence2ForConditionalGeneration")
    assert family.images is None and "decoder_input_ids" in family.inputs
    assert "is_encoder_decoder is true" in family.blind


def require_logits(
    model: PreTrainedModel, tokens: dict[str, np.ndarray], folder: Path
) -> BridgedFamily:
    """Compares a model's logits with PyTorch's, and returns its family."""
    tensors = saved_parameters(randomise(model), folder)
    family = bridged_family(model.config, type(model).__name__)
    backbone, head = family.build_backbone(model.config, "nothing"), family.build_head(model.config)
    inputs = {name: jnp.array(array) for name, array in tokens.items()}

    @jax.jit
    def run(parameters, of_head, inputs):
        return head(complete_head(head, of_head, parameters), backbone(parameters, inputs))

    of_backbone = {name: jnp.array(tensors[name]) for name in backbone.shapes}
    of_head = {name: jnp.array(tensors[name]) for name in head.shapes.keys() - backbone.shapes}
    ours = run(of_backbone, of_head, inputs)
    with torch.no_grad():
        theirs = model(**{name: torch.tensor(array) for name, array in tokens.items()})
    np.testing.assert_allclose(ours, theirs.logits.numpy(), atol=1e-4)
    return family


def test_experts_that_look_for_their_tokens_are_run_over_all(tmp_path):
    config = SwitchTransformersConfig(
        **SMALL_T5 | {"num_layers": 2, "num_sparse_encoder_layers": 1, "num_experts": 3},
        **{"num_decoder_layers": 1, "num_sparse_decoder_layers": 1, "decoder_sparse_step": 1},
        **{"encoder_sparse_step": 1, "expert_capacity": 8, "router_jitter_noise": 0.0},
        decoder_start_token_id=0,
    )
    model = SwitchTransformersForConditionalGeneration(config)
    tokens = np.arange(2, 16).reshape(2, 7)
    require_logits(model, {"input_ids": tokens, "decoder_input_ids": tokens[:, :4]}, tmp_path)
