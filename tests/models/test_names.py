"""The path is the name: a network's parameters are those of the files of `transformers`."""

import importlib
from pathlib import Path

import pytest
import transformers
from transformers import CLIPConfig, CLIPVisionConfig, DeiTConfig, GPT2Config, SiglipConfig

from adamerge_jax.errors import InputError
from adamerge_jax.models import ARCHITECTURES, family_of, is_known
from adamerge_jax.models.family import HeadAxes
from adamerge_jax.models.zero_shot import text_network
from adamerge_jax.parameter_names import matches
from tests.references import saved_parameters, shapes_in_file

SIZES = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12)
TEXT = dict(vocab_size=20, max_position_embeddings=10, num_labels=3, **SIZES)
IMAGES = dict(image_size=8, patch_size=4, **SIZES)
CLIP = CLIPConfig(
    vision_config=dict(IMAGES, hidden_size=12),
    text_config=dict(TEXT, eos_token_id=19, bos_token_id=18),
    projection_dim=6,
)


def saved_shapes(model: transformers.PreTrainedModel, folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in saved_parameters(model, folder).items()}


def require_attention_heads(heads: HeadAxes, backbone: dict[str, tuple[int, ...]]) -> None:
    for pattern, (axis, count) in heads.items():
        shapes = [shape for name, shape in backbone.items() if matches(name, [pattern])]
        assert shapes and all(shape[axis] % count == 0 for shape in shapes)


@pytest.mark.parametrize(
    ("model_class", "settings"),
    [
        ("BertForSequenceClassification", TEXT),
        ("RobertaForSequenceClassification", TEXT),
        ("XLMRobertaForSequenceClassification", TEXT),
        ("CamembertForSequenceClassification", TEXT),
        ("ElectraForSequenceClassification", dict(TEXT, embedding_size=6)),
        ("MPNetForSequenceClassification", TEXT),
        ("ViTForImageClassification", IMAGES),
        ("ViTForImageClassification", dict(IMAGES, qkv_bias=False, num_channels=1)),
        ("DeiTForImageClassification", IMAGES),
        ("Dinov2ForImageClassification", IMAGES),
        ("Dinov2ForImageClassification", dict(IMAGES, use_swiglu_ffn=True, use_mask_token=False)),
        ("Dinov2WithRegistersForImageClassification", IMAGES),
        ("SiglipForImageClassification", dict(vision_config=IMAGES)),
        (
            "SiglipForImageClassification",
            dict(vision_config=IMAGES | dict(vision_use_head=False)),
        ),
    ],
)
def test_classifiers_have_the_names_of_their_files(
    model_class: str, settings: dict, tmp_path: Path
) -> None:
    model_class = getattr(transformers, model_class)
    config = model_class.config_class(**settings)
    family = family_of(config)
    backbone = shapes_in_file(family.build_backbone(config))
    head = shapes_in_file(family.build_head(config))
    assert not backbone.keys() & head.keys()
    assert backbone | head == saved_shapes(model_class(config), tmp_path)
    assert all(name.startswith(family.prefixes) for name in backbone)
    auto_class = getattr(transformers, family.auto_class)
    loaded = auto_class._model_mapping[type(config)]
    # Of several classes it loads the first.
    assert (loaded[0] if isinstance(loaded, tuple) else loaded) is model_class
    require_attention_heads(family.heads(config), backbone)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("model_class", "settings"),
    [
        ("LlamaForCausalLM", dict(attention_bias=True, mlp_bias=True)),
        ("MistralForCausalLM", {}),
        ("Qwen2ForCausalLM", {}),
        ("Qwen3ForCausalLM", dict(head_dim=6)),
        ("Gemma2ForCausalLM", dict(head_dim=6)),
        ("Gemma3ForCausalLM", dict(head_dim=6, attention_bias=True)),
        ("Qwen3MoeForCausalLM", dict(num_experts=3, moe_intermediate_size=6)),
        ("Qwen2MoeForCausalLM", dict(num_experts=3, moe_intermediate_size=6)),
        ("OlmoeForCausalLM", dict(num_experts=3)),
        ("SmolLM3ForCausalLM", {}),
        ("Olmo2ForCausalLM", {}),
        ("Phi3ForCausalLM", {}),
        ("GraniteForCausalLM", {}),
        ("CohereForCausalLM", dict(use_qk_norm=True)),
        ("Cohere2ForCausalLM", {}),
        ("StableLmForCausalLM", dict(use_parallel_residual=True)),
        ("Starcoder2ForCausalLM", {}),
    ],
)
def test_decoders_have_the_names_of_their_files(
    model_class: str, settings: dict, tied: bool, tmp_path: Path
) -> None:
    model_class = getattr(transformers, model_class)
    config = model_class.config_class(
        **TEXT, **settings, num_key_value_heads=1, pad_token_id=0, tie_word_embeddings=tied
    )
    family = family_of(config)
    backbone = shapes_in_file(family.build_backbone(config))
    head = shapes_in_file(family.build_head(config))
    output = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert backbone == saved_shapes(model_class(config), tmp_path)
    assert head == {output: (20, 8)} and head.items() <= backbone.items()
    assert all(name.startswith(family.prefixes) for name in backbone if name != "lm_head.weight")
    auto_class = getattr(transformers, family.auto_class)
    assert auto_class._model_mapping[type(config)] is model_class

    assert matches("lm_head.weight", family.ignored(config)) == tied
    assert matches("model.layers.1.self_attn.rotary_emb.inv_freq", family.ignored(config))
    assert not any(matches(name, family.ignored(config)) for name in backbone)
    require_attention_heads(family.heads(config), backbone)


def test_both_clip_towers_have_the_names_of_the_file(tmp_path: Path) -> None:
    vision = shapes_in_file(family_of(CLIP).build_backbone(CLIP))
    text = shapes_in_file(text_network(CLIP))
    assert not vision.keys() & text.keys()
    assert vision | text == saved_shapes(transformers.CLIPModel(CLIP), tmp_path)


def test_a_clip_expert_lacks_only_what_stays_the_base_s(tmp_path: Path) -> None:
    family = family_of(CLIP)
    backbone = shapes_in_file(family.build_backbone(CLIP))
    expert = saved_shapes(transformers.CLIPVisionModel(CLIP.vision_config), tmp_path)
    (prefix,) = family.prefixes
    assert {name for name in backbone if not matches(name, family.base_only)} == {
        # Files of older releases have the prefix, recent ones do not.
        prefix + name.removeprefix(prefix)
        for name in expert
    }


def test_zero_shot_head_shapes() -> None:
    assert shapes_in_file(family_of(CLIP).build_head(CLIP)) == {
        "text_embeddings": (2, 6),
        "logit_scale": (),
        "bias": (2,),
    }


def test_one_tower_is_no_base() -> None:
    with pytest.raises(InputError, match=r"'clip_vision_model'.*must be a whole CLIP"):
        family_of(CLIPVisionConfig(**IMAGES))


def test_unknown_families_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'gpt2' is not supported; .* bert, .*clip.*vit"):
        family_of(GPT2Config())


def test_a_deit_with_two_heads_is_of_no_family() -> None:
    config = DeiTConfig(**IMAGES)
    assert is_known(config, "DeiTForImageClassification")
    assert not is_known(config, "DeiTForImageClassificationWithTeacher")


def test_towers_of_a_siglip_give_no_classes() -> None:
    config = SiglipConfig(vision_config=IMAGES)
    with pytest.raises(InputError, match=r"'siglip_vision_model' is one tower of a SigLIP.*merge"):
        family_of(config).build_head(config.vision_config)


def test_only_clip_experts_may_lack_parameters() -> None:
    lacking = {
        name
        for name, module in ARCHITECTURES.items()
        if importlib.import_module(module).FAMILY.base_only
    }
    assert lacking == {"clip"}
