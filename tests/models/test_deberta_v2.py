"""What a DeBERTa of version 2 or 3 has that no other family has."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from adamerge_jax.errors import InputError
from adamerge_jax.models import family_of
from adamerge_jax.models.deberta_v2 import log_buckets
from adamerge_jax.pipeline.workspace import open_workspace
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.statistics.linear import find_linear
from tests.models.bridge.tiny import TEXT_CONFIGS
from tests.references import bert_tokenizer, sentences, write_json_lines


@pytest.mark.parametrize(("count", "furthest"), [(256, 512), (4, 20), (32, 40), (7, 64)])
def test_log_buckets(count: int, furthest: int) -> None:
    distances = np.arange(1 - furthest, furthest)
    expected = make_log_bucket_position(torch.from_numpy(distances), count, furthest)
    np.testing.assert_array_equal(log_buckets(distances, count, furthest), expected.numpy())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"conv_kernel_size": 3}, "conv_kernel_size is 3; supported is 0"),
        ({"embedding_size": 8}, "embedding_size is 8; supported is 16"),
        ({"position_buckets": 50}, "position_buckets is 50; supported are 2 to 45"),
    ],
)
def test_others_take_their_pytorch_forward(fields: dict[str, Any], reason: str) -> None:
    config = TEXT_CONFIGS["deberta-v2"](vocab_size=40)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(InputError, match=f"config.json: {reason}"):
        family_of(config).build_backbone(config)
    assert family_of(config, "DebertaV2ForSequenceClassification").bridged


@pytest.mark.parametrize("shared", [True, False])
def test_statistics_of_projections_are_those_of_tokens(shared: bool) -> None:
    config = TEXT_CONFIGS["deberta-v2"](vocab_size=40)
    config.share_att_key = shared
    backbone = family_of(config).build_backbone(config, "nothing")
    tokens = jax.ShapeDtypeStruct((4, 12), np.int32)
    found = find_linear(backbone, backbone.shapes, {"input_ids": tokens, "attention_mask": tokens})
    masks = {name: mask for name, mask in found.masks.items() if "layer.*" in name}
    assert sum(name.endswith("_proj.weight") for name in masks) == 3
    assert set(masks.values()) == {"attention_mask"}


def test_a_tokenizer_may_give_types_to_a_model_without(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer(tmp_path)
    assert "token_type_ids" in tokenizer("a")
    config = TEXT_CONFIGS["deberta-v2"](vocab_size=len(tokenizer), num_labels=2)
    model = AutoModelForSequenceClassification.from_config(config)
    for folder in ("base", "expert"):
        model.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    texts = write_json_lines(tmp_path / "texts.jsonl", [{"text": t} for t in sentences(4, 0)])
    task = {"expert": "expert", "calibration": str(texts)}
    workspace = open_workspace(parse_recipe({"base": "base", "tasks": {"a": task}}), tmp_path)
    assert not workspace.models.family.bridged
    assert len(workspace.data.calibration["a"]) > 0
