"""Configs that describe no model are refused in one line, before anything is made by them."""

import copy
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from transformers import (
    BertConfig,
    CLIPConfig,
    DebertaV2Config,
    Dinov2WithRegistersConfig,
    ElectraConfig,
    Gemma3TextConfig,
    LlamaConfig,
    ModernBertConfig,
    MPNetConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    RobertaConfig,
    SiglipConfig,
    T5Config,
    ViTConfig,
)

from adamerge_jax.checkpoints.config_file import fields_of
from adamerge_jax.checkpoints.config_limits import require_possible
from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.errors import InputError
from adamerge_jax.models import family_of
from tests.references import SPECIAL_TOKENS

ENCODER = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
DECODER = ENCODER | dict(num_key_value_heads=1, vocab_size=40)
TINY = {
    "bert": fields_of(BertConfig(**ENCODER, vocab_size=40)),
    "electra": fields_of(ElectraConfig(**ENCODER, vocab_size=40)),
    "mpnet": fields_of(MPNetConfig(**ENCODER, vocab_size=40)),
    "roberta": fields_of(RobertaConfig(**ENCODER, vocab_size=40)),
    "modernbert": fields_of(
        ModernBertConfig(**ENCODER, vocab_size=40, **dict.fromkeys(SPECIAL_TOKENS, 0))
    ),
    "deberta-v2": fields_of(
        DebertaV2Config(**ENCODER, vocab_size=40, relative_attention=True, position_buckets=-1)
    ),
    "vit": fields_of(ViTConfig(**ENCODER, image_size=8, patch_size=4)),
    "dinov2": fields_of(Dinov2WithRegistersConfig(**ENCODER, image_size=8, patch_size=4)),
    "siglip": fields_of(
        SiglipConfig(vision_config=ENCODER | dict(image_size=8, patch_size=4, vocab_size=40))
    ),
    "clip": fields_of(
        CLIPConfig(text_config=ENCODER, vision_config=ENCODER | dict(image_size=8, patch_size=4))
    ),
    "t5": fields_of(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2)),
    "llama": fields_of(LlamaConfig(**DECODER)),
    "qwen2": fields_of(Qwen2Config(**DECODER)),
    "qwen3_moe": fields_of(Qwen3MoeConfig(**DECODER, num_experts=4, num_experts_per_tok=2)),
    "gemma3": fields_of(Gemma3TextConfig(**DECODER, head_dim=8)),
}


def checkpoint_in(folder: Path, fields: dict[str, Any]) -> Path:
    """Writes a checkpoint with these fields and one tensor."""
    save_file({"weight": np.zeros((40, 16), np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def changed(kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a tiny config with other values at dotted names."""
    fields = copy.deepcopy(TINY[kind])
    for field, value in changes.items():
        *parts, name = field.split(".")
        inner = fields
        for part in parts:
            inner = inner[part]
        inner[name] = value
    return fields


@pytest.mark.parametrize("kind", TINY)
def test_possible_configs_are_read(tmp_path, kind):
    checkpoint = Checkpoint.open(checkpoint_in(tmp_path, TINY[kind]))
    assert checkpoint.config_fields == TINY[kind]
    family_of(checkpoint.config).build_backbone(checkpoint.config)


NO_COUNT = (0, -2, 1.5, "2", True, [2], 2**31, 10**400, float("nan"))
NO_SCALE = (-1.0, float("nan"), float("inf"), 1e39, "1e-5", True, {})
IMPOSSIBLE = [
    *(("bert", "num_attention_heads", value) for value in NO_COUNT),
    *(("llama", "num_key_value_heads", value) for value in NO_COUNT),
    *(("dinov2", "num_register_tokens", value) for value in NO_COUNT),
    *(("dinov2", "use_swiglu_ffn", value) for value in (1, "true")),
    *(("siglip", "vision_config.vision_use_head", value) for value in (1, "true")),
    *(("t5", "num_heads", value) for value in NO_COUNT),
    *(("llama", "head_dim", value) for value in (0, -8, "8")),
    *(("bert", "num_hidden_layers", value) for value in (10**9, -1, 0, "2")),
    *(("t5", "num_decoder_layers", value) for value in (10**9, -1)),
    *(("gemma3", "num_hidden_layers", value) for value in (10**9, 2_000_000_000)),
    ("clip", "text_config.num_hidden_layers", 10**9),
    *(("qwen3_moe", "num_experts", value) for value in (10**9, 0, "8")),
    *(("qwen3_moe", "num_experts_per_tok", value) for value in (0, -1, 2.5)),
    *(("bert", "num_labels", value) for value in (10**7, 10**9, -1, 2.5, "3")),
    ("clip", "vision_config.num_labels", 10**9),
    *(("bert", field, -16) for field in ("hidden_size", "intermediate_size", "vocab_size")),
    *(("t5", field, 0) for field in ("d_model", "d_kv", "d_ff", "vocab_size")),
    *(("bert", field, 0) for field in ("max_position_embeddings", "type_vocab_size")),
    *(("modernbert", "local_attention", value) for value in (0, -6, "8")),
    *(("modernbert", "norm_eps", value) for value in NO_SCALE),
    *(("deberta-v2", "position_buckets", value) for value in (-2, 2.5, "8", True, [4], 2**31)),
    ("deberta-v2", "share_att_key", "yes"),
    ("deberta-v2", "norm_rel_ebd", ["layer_norm"]),
    *(("bert", "layer_norm_eps", value) for value in NO_SCALE),
    *(("llama", "rms_norm_eps", value) for value in NO_SCALE),
    *(("llama", "rope_parameters.rope_theta", value) for value in (0, *NO_SCALE)),
    *(("llama", "rope_theta", value) for value in (0, *NO_SCALE)),
    ("llama", "rope_scaling", {"rope_type": "linear", "factor": 0.0}),
    ("llama", "rope_scaling", {"rope_type": "linear", "factor": float("nan")}),
    ("llama", "rope_scaling", "linear"),
    ("gemma3", "rope_parameters.full_attention.rope_theta", float("nan")),
    ("gemma3", "query_pre_attn_scalar", 0),
    ("gemma3", "sliding_window", -1),
    ("gemma3", "final_logit_softcapping", "30"),
    *(("vit", field, value) for field in ("image_size", "patch_size") for value in (0, [4, -4])),
    ("vit", "num_channels", 0),
    ("vit", "qkv_bias", "false"),
    ("llama", "tie_word_embeddings", "false"),
    ("llama", "attention_bias", 1),
    ("bert", "hidden_act", 3),
    ("bert", "hidden_act", ["gelu"]),
    ("t5", "dense_act_fn", ["gelu"]),
    ("t5", "is_gated_act", "yes"),
    ("bert", "id2label", ["a", "b"]),
    ("bert", "architectures", "BertModel"),
    ("qwen2", "layer_types", "full_attention"),
]


@pytest.mark.parametrize(("kind", "field", "value"), IMPOSSIBLE)
def test_a_value_that_no_model_has(tmp_path, kind, field, value):
    folder = checkpoint_in(tmp_path, changed(kind, {field: value}))
    started = time.process_time()
    with pytest.raises(InputError, match=rf"config\.json: .*{field.partition('.')[0]}") as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("bert", {"num_attention_heads": 3}, "hidden_size is 16, num_attention_heads is 3"),
        ("vit", {"num_attention_heads": 32}, "hidden_size is 16, num_attention_heads is 32"),
        ("clip", {"vision_config.num_attention_heads": 3}, r"attention heads \(3\)"),
        (
            "llama",
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_attention_heads is 4, num_key_value_heads is 3",
        ),
        ("llama", {"num_key_value_heads": 4}, "num_attention_heads is 2, num_key_value_heads is 4"),
        ("llama", {"head_dim": 3}, "heads have 3 features"),
        ("qwen3_moe", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, num_experts is 4"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("t5", {"head_dim": None}, "d_kv is null"),
        ("bert", {"pad_token_id": 40}, "pad_token_id is 40, vocab_size is 40"),
        ("llama", {"pad_token_id": 10**9}, "pad_token_id is 1000000000"),
        ("bert", {"hidden_size": None}, "hidden_size"),
        ("vit", {"patch_size": 16}, "image_size is 8, patch_size is 16"),
        ("vit", {"image_size": [2, 8]}, r"image_size is \[2, 8\], patch_size is 4"),
    ],
)
def test_fields_that_contradict_each_other(tmp_path, kind, changes, match):
    fields = changed(kind, changes)
    with pytest.raises(InputError, match=rf"config\.json.*{match}") as caught:
        Checkpoint.open(checkpoint_in(tmp_path, fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "field", "value", "match"),
    [
        ("bert", "position_embedding_type", "relative_key", "position_embedding_type 'relative"),
        ("roberta", "position_embedding_type", "relative_key_query", "position_embedding_type"),
        ("roberta", "pad_token_id", None, "pad_token_id is None"),
        ("roberta", "pad_token_id", -1, "pad_token_id is -1"),
        ("roberta", "pad_token_id", 511, "pad_token_id is 511"),
        ("bert", "is_decoder", True, "is_decoder is true"),
        ("electra", "position_embedding_type", "relative_key", "position_embedding_type 'relative"),
        ("mpnet", "relative_attention_num_buckets", 64, "relative_attention_num_buckets is 64"),
        ("llama", "rope_scaling", {"rope_type": "spiral", "factor": 4.0}, "rope_type 'spiral'"),
        ("llama", "rope_scaling", {"rope_type": "linear"}, "factor"),
        ("llama", "partial_rotary_factor", 0.5, "partial_rotary_factor"),
        ("qwen2", "layer_types", ["full_attention", "chunked_attention"], "chunked_attention"),
    ],
)
def test_a_model_that_is_not_computed_here(tmp_path, kind, field, value, match):
    with pytest.raises(InputError, match=rf"config\.json.*{match}") as caught:
        config = Checkpoint.open(checkpoint_in(tmp_path, changed(kind, {field: value}))).config
        family_of(config).build_backbone(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["bert", "vit", "llama"])
def test_sizes_of_other_models_are_left_to_the_comparison_with_the_weights(tmp_path, kind):
    """A model of huge size is described without allocating it."""
    fields = TINY[kind] | dict(hidden_size=2**30, num_attention_heads=2**20, head_dim=None)
    fields |= {"num_key_value_heads": 2**20} if kind == "llama" else {}
    config = Checkpoint.open(checkpoint_in(tmp_path, fields)).config
    family_of(config).build_backbone(config)


FIELDS = sorted(
    {name for fields in TINY.values() for name in fields} | {"num_labels", "rope_theta"}
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner),
    max_leaves=6,
)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_any_fields_are_possible_or_refused_in_one_line(fields):
    tensors = {"weight": SimpleNamespace(shape=(40, 16))}
    try:
        require_possible(fields, "config.json", tensors)
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) < 300
    else:
        counts = [fields.get("num_hidden_layers"), fields.get("num_labels")]
        assert all(count is None or 0 <= count <= 2**16 for count in counts)


@pytest.mark.parametrize("missing", ["{}", '{"hidden_size": 16}', '{"model_type": 3}'])
def test_a_config_names_its_model(tmp_path, missing):
    folder = checkpoint_in(tmp_path, {})
    (folder / "config.json").write_text(missing)
    with pytest.raises(InputError, match=r"config\.json must name its model_type"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("t5", "attribute_map"),
        ("bert", "to_dict"),
        ("clip", "text_config.sub_configs"),
        ("bert", "__post_init__"),
        ("bert", "__class__"),
    ],
)
def test_fields_do_not_replace_the_workings_of_a_config(tmp_path, kind, field):
    with pytest.raises(InputError, match=rf"config\.json: '{field}' is no field of a model"):
        Checkpoint.open(checkpoint_in(tmp_path, changed(kind, {field: {}})))


def test_further_config_files_are_not_read(tmp_path):
    folder = checkpoint_in(tmp_path, TINY["bert"] | {"configuration_files": ["config.4.0.0.json"]})
    (folder / "config.4.0.0.json").write_text(json.dumps(changed("bert", {"num_labels": 10**9})))
    with pytest.raises(InputError, match="configuration_files"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"1" * 5000])
def test_a_file_that_holds_no_fields(tmp_path, content):
    folder = checkpoint_in(tmp_path, {})
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json (is not JSON|holds no fields)") as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["model_type", "dtype", "partial_rotary_factor", "hidden_act"])
def test_control_characters_do_not_reach_the_terminal(tmp_path, field):
    folder = checkpoint_in(tmp_path, changed("llama", {field: "a\n\x1b[31m"}))
    with pytest.raises(InputError) as caught:
        config = Checkpoint.open(folder).config
        family_of(config).build_backbone(config)
    assert str(caught.value).isprintable()


def test_code_of_a_checkpoint_is_not_run(tmp_path, caplog):
    """Its own model class may compute another thing than ours, which is said."""
    auto_map = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    folder = checkpoint_in(tmp_path, TINY["bert"] | {"auto_map": auto_map})
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    Checkpoint.open(folder)
    assert not (tmp_path / "ran").exists()
    assert "names code of its own (auto_map), which is never run" in caplog.text


def test_counts_of_other_architectures_may_be_lists_or_zero():
    fields = {"num_heads": [1, 3, 6], "type_vocab_size": 0, "qkv_bias": [True, False]}
    require_possible(fields, "config.json", {}, usual=False)
    for wrong in (
        {"num_heads": [1, "x"]},
        {"num_heads": []},
        {"qkv_bias": [1]},
        {"vocab_size": -1},
    ):
        with pytest.raises(InputError, match="expected"):
            require_possible(wrong, "config.json", {}, usual=False)


def test_a_type_may_lack_a_part():
    fields = {"model_type": "deberta-v2", "type_vocab_size": 0}
    require_possible(fields, "config.json", {})
    for wrong in (fields | {"model_type": "bert"}, fields | {"vocab_size": 0}):
        with pytest.raises(InputError, match="vocab_size is 0; expected a whole number above 0"):
            require_possible(wrong, "config.json", {})


def test_the_parts_of_other_architectures_may_have_numbers_of_layers_of_their_own():
    fields = {"num_hidden_layers": {"vision": 2, "language": 3}}  # an LXMERT's
    require_possible(fields, "config.json", {}, usual=False)
    with pytest.raises(InputError, match="num_hidden_layers is a group of fields"):
        require_possible(fields, "config.json", {}, usual=True)
    with pytest.raises(InputError, match="num_hidden_layers is a group of fields"):
        wrong = {"num_hidden_layers": {"vision": 2, "language": -3}}
        require_possible(wrong, "config.json", {}, usual=False)


def test_a_switch_of_other_architectures_may_have_a_name():
    for kind in ("all", "vision"):  # a Gemma 4's
        require_possible({"use_bidirectional_attention": kind}, "config.json", {}, usual=False)
    with pytest.raises(InputError, match="expected true or false"):
        require_possible({"use_bidirectional_attention": "no"}, "config.json", {}, usual=False)


def test_the_number_of_positions_of_other_architectures_may_be_written_as_1200_0():
    fields = {"max_position_embeddings": 1200.0}
    require_possible(fields, "config.json", {}, usual=False)
    wrong = [
        *({"max_position_embeddings": value} for value in (0.0, 1.5, 1e10, float("inf"))),
        {"hidden_size": 16.0},
    ]
    for other in wrong:
        with pytest.raises(InputError, match="expected a whole number above 0"):
            require_possible(other, "config.json", {}, usual=False)
    with pytest.raises(InputError, match=r"is 1200\.0; expected a whole number"):
        require_possible(fields, "config.json", {})


def test_a_model_without_windows_may_be_saved_with_a_window_of_0():
    """As a Qwen2-MoE is."""
    without = {"use_sliding_window": False, "sliding_window": 0}
    for fields in (without, {"text_config": without}):
        require_possible(fields, "config.json", {})
    for wrong in ({"sliding_window": 0}, without | {"use_sliding_window": True}):
        with pytest.raises(InputError, match="sliding_window is 0; expected a whole number"):
            require_possible(wrong, "config.json", {})
