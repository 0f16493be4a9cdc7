"""The fields of a config that a merge changes, and those that it leaves as they are."""

from types import SimpleNamespace

import pytest
from transformers import AutoConfig, Gemma3TextConfig, LlamaConfig, T5Config

from adamerge_jax.checkpoints.config_export import (
    readable_by_older_versions,
    special_tokens,
    tokenizer_readable_by_older_versions,
    with_dtype,
    with_head,
    with_special_tokens,
    with_tokenizer,
    without_head,
    without_old_weights,
)
from adamerge_jax.checkpoints.config_file import fields_of

QUANTIZED = {"quant_method": "bitsandbytes", "load_in_4bit": True}
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)


def test_what_described_the_old_weights_is_dropped():
    kept = {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}, "mine": [1]}
    fields = kept | {
        "quantization_config": QUANTIZED,
        "compression_config": {"format": "dense"},
        "quantization": {"bits": 4},
        "_name_or_path": "/home/someone/secret",
        "auto_map": {"AutoModel": "modeling.Model"},
        "text_config": {"hidden_size": 8, "quantization_config": QUANTIZED},
    }
    assert without_old_weights(fields) == kept | {"text_config": {"hidden_size": 8}}
    assert "auto_map" in fields  # the caller's are untouched


def test_a_head_is_dropped_and_given():
    fields = {
        "architectures": ["BertForSequenceClassification"],
        "id2label": {"0": "no", "1": "yes"},
        "label2id": {"no": 0, "yes": 1},
        "problem_type": "multi_label_classification",
        "num_labels": 2,
        "hidden_size": 8,
    }
    bare = {"architectures": ["BertModel"], "hidden_size": 8}
    assert without_head(fields, "BertModel") == bare
    del bare["architectures"]
    assert without_head(fields, None) == bare
    assert with_head(fields, "BertFor", ["a", "b", "c"]) == bare | {
        "architectures": ["BertFor"],
        "id2label": {"0": "a", "1": "b", "2": "c"},
        "label2id": {"a": 0, "b": 1, "c": 2},
    }


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"torch_dtype": "float32", "transformers_version": "5.1.0"}, "torch_dtype"),
        ({"dtype": "float32", "transformers_version": "4.57.1"}, "dtype"),
        ({"transformers_version": "4.57.1"}, "torch_dtype"),
        ({"transformers_version": "5.0.0"}, "dtype"),
        ({"transformers_version": "4.6.0.dev0"}, "torch_dtype"),
        ({"transformers_version": 5}, "dtype"),
        ({}, "torch_dtype"),
    ],
)
def test_the_dtype_has_the_name_that_the_file_uses(fields, name):
    assert with_dtype(fields, "bfloat16") == fields | {name: "bfloat16"}


def test_parts_have_the_dtype_where_they_had_one():
    fields = {"torch_dtype": None, "text_config": {"torch_dtype": "float32"}, "vision_config": {}}
    assert with_dtype(fields, "float16") == {
        "torch_dtype": "float16",
        "text_config": {"torch_dtype": "float16"},
        "vision_config": {},
    }


# Fields that older versions look for


@pytest.mark.parametrize(
    ("config", "added"),
    [
        (
            LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
            {"rope_theta": 5e5},
        ),
        (
            LlamaConfig(rope_parameters=LLAMA3 | {"rope_theta": 5e5}),
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        ),
        (
            Gemma3TextConfig(
                rope_parameters={
                    "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                    "sliding_attention": dict(rope_type="default", rope_theta=2e4),
                }
            ),
            {
                "rope_theta": 1e6,
                "rope_scaling": dict(rope_type="linear", factor=8.0),
                "rope_local_base_freq": 2e4,
            },
        ),
        (
            T5Config(tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
            {"tie_word_embeddings": False},
        ),
        (T5Config(), {}),
    ],
)
def test_older_names_are_added_and_change_nothing(tmp_path, config, added):
    fields = fields_of(config)
    readable = readable_by_older_versions(fields)
    assert readable == fields | added
    again = AutoConfig.for_model(**readable)
    assert fields_of(again) == fields


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"full_attention": None}},
        {"rope_parameters": {"full_attention": {"rope_type": "proportional", "rope_theta": 1e6}}},
        {"rope_parameters": None},
        {"hidden_size": 8},
    ],
)
def test_older_files_stay_as_they_are(fields):
    assert readable_by_older_versions(fields) == fields


def test_older_names_of_a_tokenizer_s_settings():
    fields = {
        "tokenizer_class": "TokenizersBackend",
        "extra_special_tokens": ["<|x|>"],
        "backend": "tokenizers",
    }
    assert tokenizer_readable_by_older_versions(fields) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<|x|>"],
        "backend": "tokenizers",
    }
    older = {"tokenizer_class": "BertTokenizer", "extra_special_tokens": {"image": "<|i|>"}}
    assert tokenizer_readable_by_older_versions(older) == older


# Special tokens


def tokenizer(**ids: int) -> SimpleNamespace:
    return SimpleNamespace(
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | ids
    )


@pytest.mark.parametrize(
    ("fields", "ids", "expected"),
    [
        ({"eos_token_id": 5}, dict(eos_token_id=5), 5),
        ({"eos_token_id": 5}, dict(eos_token_id=7), 7),  # an adapter's own token
        ({"eos_token_id": [5, 7]}, dict(eos_token_id=7), [5, 7]),
        ({"eos_token_id": [5, 6]}, dict(eos_token_id=7), 7),
        ({"eos_token_id": 5}, {}, 5),
        ({"eos_token_id": 5}, dict(eos_token_id=400), 5),  # beyond the vocabulary
        ({}, {}, 2),  # a Llama's default
        ({"eos_token_id": None}, dict(eos_token_id=7), None),
    ],
)
def test_special_tokens(fields, ids, expected):
    config = LlamaConfig(vocab_size=40)
    assert special_tokens(fields, config, tokenizer(**ids))["eos_token_id"] == expected


def test_generation_settings_keep_further_ends():
    fields = {"eos_token_id": [7, 5], "temperature": 0.6, "bos_token_id": 1}
    ids = {"eos_token_id": 7, "bos_token_id": 3, "pad_token_id": None}
    assert with_special_tokens(fields, ids) == fields | {"bos_token_id": 3}


def test_a_config_gets_the_tokenizer_of_another_model():
    fields = {"eos_token_id": [5, 6], "pad_token_id": 0, "tokenizer_class": "OldTokenizer", "a": 1}
    ids = {"eos_token_id": 6, "pad_token_id": None, "bos_token_id": None}
    changed = {"eos_token_id": 6, "pad_token_id": None, "a": 1}
    assert with_tokenizer(fields, {}, ids) == changed
    of_owner = {"tokenizer_class": "PhobertTokenizer"}
    assert with_tokenizer(fields, of_owner, ids) == changed | of_owner
