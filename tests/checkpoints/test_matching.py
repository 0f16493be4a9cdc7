import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma3TextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    T5Config,
    ViTConfig,
)

from adamerge_jax.checkpoints.architecture import require_same_architecture
from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.matching import match
from adamerge_jax.errors import InputError

BERT = dict(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=20,
    num_labels=3,
)
VISION = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
TEXT = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    vocab_size=40,
    max_position_embeddings=8,
)
HEAD = ("classifier.*",)


def shapes_of(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def handmade(folder: Path, tensors: dict[str, np.ndarray], **config) -> Checkpoint:
    """A checkpoint with exactly these tensors."""
    BertConfig(**{**BERT, **config}).save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder)


def refused(message: str, checkpoint: Checkpoint, expected, **arguments) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        match(checkpoint, expected, role="expert 'trec'", **arguments)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def classifier() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**BERT))


def test_every_name_as_expected(tmp_path, classifier):
    classifier.save_pretrained(tmp_path)
    expected = shapes_of(classifier)
    matched = match(Checkpoint.open(tmp_path), expected, role="base", prefixes=["bert."])
    assert matched.names == {name: name for name in expected}
    assert matched.extra == ()
    assert matched.role == "base"
    name = "bert.pooler.dense.weight"
    assert matched.shape(name) == (16, 16)
    assert matched.dtype(name) == np.float32
    np.testing.assert_array_equal(matched.read(name), classifier.state_dict()[name].numpy())


def test_model_saved_without_head_and_prefix(tmp_path, classifier):
    model = BertModel(BertConfig(**BERT))
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    expected = shapes_of(classifier)
    matched = match(checkpoint, expected, role="base", prefixes=["bert."], optional=HEAD)
    assert matched.names["bert.pooler.dense.bias"] == "pooler.dense.bias"
    assert expected.keys() - matched.names.keys() == {"classifier.weight", "classifier.bias"}
    np.testing.assert_array_equal(
        matched.read("bert.embeddings.word_embeddings.weight"),
        model.embeddings.word_embeddings.weight.detach().numpy(),
    )
    refused("lacks classifier.weight (and 1 more)", checkpoint, expected, prefixes=["bert."])
    refused("lacks bert.", checkpoint, expected, optional=HEAD)


def test_legacy_layer_norm_names(tmp_path):
    checkpoint = handmade(
        tmp_path,
        {
            "bert.embeddings.LayerNorm.gamma": np.full(4, 2, np.float32),
            "bert.embeddings.LayerNorm.beta": np.full(4, 3, np.float32),
            "cls.predictions.bias": np.zeros(4, np.float32),
            "layer_scale.gamma": np.zeros(4, np.float32),
        },
    )
    name = "bert.embeddings.LayerNorm"
    expected = {f"{name}.weight": (4,), f"{name}.bias": (4,)}
    matched = match(checkpoint, expected, role="base", allow_extra=True)
    assert matched.read(f"{name}.weight")[0] == 2
    assert matched.read(f"{name}.bias")[0] == 3
    assert matched.extra == ("cls.predictions.bias", "layer_scale.gamma")


def test_the_exact_name_wins(tmp_path):
    checkpoint = handmade(
        tmp_path, {name: np.ones(2, np.float32) for name in ("bert.a", "a", "b", "c")}
    )
    expected = {"bert.a": (2,), "b": (2,), "bert.b": (2,), "bert.c": (2,)}
    arguments = dict(prefixes=["bert."], optional=["bert.b"], allow_extra=True)
    matched = match(checkpoint, expected, role="base", **arguments)
    # `b` is a parameter of its own, so it does not stand for `bert.b` as well.
    assert matched.names == {"bert.a": "bert.a", "b": "b", "bert.c": "c"}
    assert matched.extra == ("a",)


def test_tensors_that_are_no_parameters(tmp_path, classifier):
    CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT)).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    tower = CLIPVisionModel(CLIPVisionConfig(**VISION))
    expected = {
        f"vision_model.{name.removeprefix('vision_model.')}": shape
        for name, shape in shapes_of(tower).items()
        if "position_ids" not in name
    }
    ignored = ["*.position_ids", "text_model.*"]
    matched = match(checkpoint, expected, role="base", ignored=ignored, allow_extra=True)
    assert matched.names.keys() == expected.keys()
    assert matched.extra == ("logit_scale", "text_projection.weight", "visual_projection.weight")
    refused(
        f"expert 'trec' ({tmp_path}) has logit_scale (and 2 more), which is no parameter",
        checkpoint,
        expected,
        ignored=ignored,
    )


def test_wrong_shapes(tmp_path):
    tensors = {"a.weight": np.ones((2, 3), np.float32), "a.bias": np.ones(2, np.float32)}
    checkpoint = handmade(tmp_path, tensors)
    refused(
        f"expert 'trec' ({tmp_path}): a.weight has shape (2, 3), expected (3, 3) (and 1 more)",
        checkpoint,
        {"a.weight": (3, 3), "a.bias": (3,)},
        optional=["*"],
    )


@pytest.mark.parametrize("name", ["bert.embeddings.word_embeddings.weight", "embed_tokens.weight"])
def test_resized_vocabulary(tmp_path, name):
    checkpoint = handmade(tmp_path, {name: np.ones((43, 4), np.float32), "bias": np.ones(43)})
    refused(
        f"has a resized vocabulary: {name} says 43 tokens where 40 are expected; save it again "
        "after model.resize_token_embeddings(40)",
        checkpoint,
        {"bias": (40,), name: (40, 4)},
    )


def test_more_positions_are_no_vocabulary(tmp_path):
    name = "bert.embeddings.position_embeddings.weight"
    checkpoint = handmade(tmp_path, {name: np.ones((30, 4), np.float32)})
    refused(f"{name} has shape (30, 4), expected (20, 4)", checkpoint, {name: (20, 4)})


def test_quantised_weights(tmp_path):
    checkpoint = handmade(tmp_path, {"a": np.ones(2, np.int8), "b": np.ones(2, np.float16)})
    refused("is quantised (integers; it has a stored as int8)", checkpoint, {"a": (2,), "b": (2,)})


def test_reading_refuses_nan(tmp_path):
    checkpoint = handmade(tmp_path, {"a": np.array([1, np.nan], ml_dtypes.bfloat16)})
    matched = match(checkpoint, {"bert.a": (2,)}, role="expert 'trec'", prefixes=["bert."])
    with pytest.raises(InputError, match=r"expert 'trec' .*bert\.a holds 1 NaN"):
        matched.read("bert.a")


# Architectures


def config_only(folder: Path, config) -> Checkpoint:
    config.save_pretrained(folder)
    save_file({"a": np.ones(1, np.float32)}, folder / "model.safetensors")
    return Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 3),
        ("num_attention_heads", 4),
        ("hidden_act", "gelu_new"),
        ("layer_norm_eps", 1e-5),
        ("max_position_embeddings", 24),
    ],
)
def test_field_that_differs(tmp_path, field, value):
    base = config_only(tmp_path / "base", BertConfig(**BERT))
    expert = config_only(tmp_path / "expert", BertConfig(**{**BERT, field: value}))
    message = (
        f"expert 'trec' ({tmp_path / 'expert'}) has {field} {value!r} in its config.json, the "
        f"base ({tmp_path / 'base'}) has {getattr(base.config, field)!r}"
    )
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        require_same_architecture(base, expert, role="expert 'trec'")
    assert "\n" not in str(caught.value)


def test_positions_of_another_type_than_those_that_a_base_leaves_out(tmp_path):
    base = config_only(tmp_path / "base", BertConfig(**BERT))
    relative = BertConfig(**BERT, position_embedding_type="relative_key")
    expert = config_only(tmp_path / "expert", relative)
    with pytest.raises(InputError, match="has position_embedding_type 'relative_key'"):
        require_same_architecture(base, expert, role="expert 'trec'")
    absolute = BertConfig(**BERT, position_embedding_type="absolute")
    require_same_architecture(
        base, config_only(tmp_path / "absolute", absolute), role="expert 'trec'"
    )


def test_layers_with_values_of_their_own_are_compared(tmp_path):
    layers = ["sliding_attention", "full_attention"]
    wider = {
        name: config_only(
            tmp_path / name,
            Gemma4TextConfig(num_hidden_layers=2, layer_types=layers, per_layer_config=own),
        )
        for name, own in {
            "base": {1: {"head_dim": 512}},
            "same": {1: {"head_dim": 512}},
            "other": {1: {"head_dim": 384}},
        }.items()
    }
    require_same_architecture(wider["base"], wider["same"], role="expert 'trec'")
    with pytest.raises(InputError, match=r"has head_dim \[256, 384\]"):
        require_same_architecture(wider["base"], wider["other"], role="expert 'trec'")


@pytest.mark.parametrize("of_base", [None, 8])
def test_a_window_and_no_window_differ(tmp_path, of_base):
    windows = {"base": of_base, "expert": 8 if of_base is None else None}
    base, expert = (
        config_only(tmp_path / name, MistralConfig(**DECODER, sliding_window=window))
        for name, window in windows.items()
    )
    with pytest.raises(InputError, match="has sliding_window"):
        require_same_architecture(base, expert, role="expert 'trec'")


def test_fields_that_may_differ(tmp_path):
    base = config_only(tmp_path / "base", BertConfig(**BERT))
    changes = dict(num_labels=7, hidden_dropout_prob=0.3, classifier_dropout=0.5)
    expert = config_only(tmp_path / "expert", BertConfig(**{**BERT, **changes}))
    require_same_architecture(base, expert, role="expert 'trec'")


DECODER = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=32,
)


@pytest.mark.parametrize("model_class", [Qwen2Config, Gemma3TextConfig, T5Config])
def test_the_number_of_computed_positions_may_differ(tmp_path, model_class):
    """Qwen2.5 has 131072, its Instruct 32768."""
    sizes = {} if model_class is T5Config else DECODER
    base = config_only(tmp_path / "base", model_class(**sizes, max_position_embeddings=64))
    expert = config_only(tmp_path / "expert", model_class(**sizes, max_position_embeddings=32))
    require_same_architecture(base, expert, role="expert 'trec'")


@pytest.mark.parametrize("by_layer", [False, True])
def test_the_legacy_name_of_a_rope_type(tmp_path, by_layer):
    """`type` beside the same `rope_type` says nothing; the rest of the settings is compared."""

    def with_rope(name: str, **rope) -> Checkpoint:
        if not by_layer:
            return config_only(tmp_path / name, LlamaConfig(**DECODER, rope_parameters=rope))
        plain = {"rope_type": "default", "rope_theta": 10000.0}
        parameters = {"sliding_attention": plain, "full_attention": rope}
        return config_only(tmp_path / name, Gemma3TextConfig(**DECODER, rope_parameters=parameters))

    linear = dict(rope_type="linear", rope_theta=10000.0, factor=2.0)
    base = with_rope("base", **linear)
    legacy = with_rope("legacy", type="linear", **linear)
    assert "'type'" in str(legacy.config.rope_parameters)
    require_same_architecture(base, legacy, role="expert 'trec'")
    require_same_architecture(legacy, base, role="expert 'trec'")
    longer = with_rope("longer", type="linear", **linear | {"factor": 4.0})
    with pytest.raises(InputError, match=r"has rope_parameters .*'factor': 4\.0"):
        require_same_architecture(base, longer, role="expert 'trec'")


def test_another_model_type(tmp_path):
    base = config_only(tmp_path / "base", BertConfig(**BERT))
    expert = config_only(tmp_path / "expert", ViTConfig(**VISION))
    with pytest.raises(InputError, match=r"has model_type 'vit', the base .* has 'bert'"):
        require_same_architecture(base, expert, role="expert 'trec'")


def test_clip_and_its_vision_tower(tmp_path):
    whole = CLIPConfig(vision_config=VISION, text_config=TEXT)
    other = CLIPConfig(vision_config={**VISION, "patch_size": 2}, text_config=TEXT)
    base = config_only(tmp_path / "base", whole)
    tower = config_only(tmp_path / "tower", CLIPVisionConfig(**VISION))
    wrong = config_only(tmp_path / "wrong", CLIPVisionConfig(**{**VISION, "patch_size": 2}))
    require_same_architecture(base, tower, role="expert 'cars'")
    require_same_architecture(tower, base, role="expert 'cars'")
    with pytest.raises(InputError, match=r"has patch_size 2 .*has 4"):
        require_same_architecture(base, wrong, role="expert 'cars'")
    with pytest.raises(InputError, match=r"has patch_size 2 .*has 4"):
        require_same_architecture(
            base, config_only(tmp_path / "other", other), role="expert 'cars'"
        )
