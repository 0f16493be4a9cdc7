"""Names of several versions of `transformers` lead to one, against `transformers` itself."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from adamerge_jax.checkpoints.renamed import common_name, renamed

SMALL = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=32,
)
TOWER = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
CASES: dict[str, dict[str, Any]] = {
    "llava": dict(text_config=SMALL | dict(model_type="llama"), vision_config=TOWER),
    "gemma3": dict(text_config=SMALL | dict(head_dim=8), vision_config=TOWER),
    "internvl": dict(text_config=SMALL | dict(model_type="qwen2"), vision_config=TOWER),
    "qwen2_vl": dict(
        text_config=SMALL, vision_config=dict(depth=1, embed_dim=16, hidden_size=16, num_heads=2)
    ),
    "vit": TOWER,
    "dinov2": TOWER,
}


def made(model_type: str) -> PreTrainedModel:
    """A model without values."""
    config = AutoConfig.for_model(model_type, **CASES[model_type])
    kind = AutoModelForImageTextToText if "vision_config" in CASES[model_type] else AutoModel
    with torch.device("meta"):
        return kind.from_config(config)


@pytest.mark.parametrize("model_type", CASES)
def test_saved_names_and_those_of_modules(model_type: str) -> None:
    model = made(model_type)
    of_modules = model.state_dict()
    saved = revert_weight_conversion(model, dict(of_modules))
    assert saved.keys() != of_modules.keys()
    found = renamed(saved, of_modules, model_type)
    assert found.keys() == saved.keys() and set(found.values()) == of_modules.keys()
    for name, in_module in found.items():
        assert saved[name] is of_modules[in_module]
    assert renamed(of_modules, saved, model_type).keys() == of_modules.keys()


def test_a_version_between() -> None:
    """Files of 4.51 and before, which wrap the language model once more."""
    for name in (
        "language_model.model.layers.3.mlp.up_proj.weight",
        "model.language_model.model.layers.3.mlp.up_proj.weight",
        "model.language_model.layers.3.mlp.up_proj.weight",
    ):
        short = "model.language_model.layers.3.mlp.up_proj.weight"
        assert common_name(name, "llava") == short
    # Elsewhere these are names of other things.
    assert common_name("visual.blocks.0.weight", "bert") == "visual.blocks.0.weight"


def test_two_names_that_lead_to_one_are_left_out() -> None:
    twice = ["model.language_model.norm.weight", "language_model.model.norm.weight"]
    assert renamed(["model.language_model.model.norm.weight"], twice, "llava") == {}
