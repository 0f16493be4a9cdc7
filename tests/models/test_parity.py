"""Every family computes what `transformers` computes with PyTorch, hidden states included.

The tolerance: both sides compute in float32 and order their sums differently, which leaves a few
units in the last place (1e-7 relative) per operation; the measured differences of these models,
whose values are of the order of 1 to 10, are a few 1e-6. 1e-4 is well above that and below the
smallest slip that is likely: taking one GELU for the other shows as 2.4e-4 here, a wrong mask or
position as 1.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from torch.func import functional_call
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from adamerge_jax.errors import InputError
from adamerge_jax.mixing import Mixture
from adamerge_jax.models import family_of
from adamerge_jax.models.layers import ACTIVATIONS, activation_of
from adamerge_jax.models.rematerialization import Rematerialize
from adamerge_jax.models.zero_shot import text_network
from adamerge_jax.parameter_names import is_stacked, unstack
from adamerge_jax.task_vectors import DenseDelta, task_vectors
from tests.references import SPECIAL_TOKENS, parameters_of, randomise, saved_parameters

TOLERANCE = 1e-4

SIZES = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40)
TEXT = dict(vocab_size=50, max_position_embeddings=20, num_labels=5, **SIZES)
MODERN = dict(
    TEXT, local_attention=6, global_attn_every_n_layers=2, **dict.fromkeys(SPECIAL_TOKENS, 0)
)
DEBERTA = dict(
    TEXT,
    relative_attention=True,
    position_buckets=4,
    pos_att_type=["p2c", "c2p"],
    share_att_key=True,
    norm_rel_ebd="layer_norm",
    position_biased_input=False,
)
IMAGES = dict(image_size=12, patch_size=4, **SIZES)
DINOV2 = dict(IMAGES, num_labels=5, mlp_ratio=2)


@dataclasses.dataclass(frozen=True)
class Text:
    """A batch of 3 sequences: `padding` pads 0, 2 and 5 tokens of them on that side."""

    length: int = 12
    padding: str | None = "right"
    token_types: bool = False

    def batch(self, config: PretrainedConfig) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(0)
        token_ids = generator.integers(5, config.vocab_size, (3, self.length))
        mask = np.ones_like(token_ids)
        for row, count in enumerate((0, 2, 5) if self.padding else ()):
            where = slice(0, count) if self.padding == "left" else slice(self.length - count, None)
            mask[row, where] = 0
            token_ids[row, where] = config.pad_token_id
        batch = {"input_ids": token_ids, "attention_mask": mask}
        if self.token_types:
            batch["token_type_ids"] = generator.integers(0, config.type_vocab_size, mask.shape)
        return batch


CASES = {
    "bert": ("BertForSequenceClassification", dict(TEXT), Text()),
    "bert left padding, token types": (
        "BertForSequenceClassification",
        dict(TEXT, hidden_act="gelu_new", type_vocab_size=3),
        Text(length=13, padding="left", token_types=True),
    ),
    "bert one token": ("BertForSequenceClassification", dict(TEXT), Text(length=1, padding=None)),
    "bert relu": (
        "BertForSequenceClassification",
        dict(TEXT, hidden_act="relu", layer_norm_eps=1e-3),
        Text(length=7, padding=None, token_types=True),
    ),
    "roberta": ("RobertaForSequenceClassification", dict(TEXT), Text()),
    "roberta left padding": (
        "RobertaForSequenceClassification",
        dict(TEXT, hidden_act="silu", pad_token_id=3),
        Text(length=15, padding="left", token_types=True),
    ),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", dict(TEXT), Text(length=11)),
    "camembert": ("CamembertForSequenceClassification", dict(TEXT), Text(padding="left")),
    "distilbert": (
        "DistilBertForSequenceClassification",
        dict(
            vocab_size=50,
            max_position_embeddings=20,
            num_labels=5,
            dim=24,
            n_layers=3,
            n_heads=4,
            hidden_dim=40,
            activation="relu",
        ),
        Text(),
    ),
    "electra": (
        "ElectraForSequenceClassification",
        dict(TEXT, embedding_size=16, hidden_act="relu"),
        Text(token_types=True),
    ),
    "electra as wide embeddings, left padding": (
        "ElectraForSequenceClassification",
        dict(TEXT, embedding_size=24),
        Text(length=13, padding="left"),
    ),
    "mpnet": ("MPNetForSequenceClassification", dict(TEXT, hidden_act="relu"), Text()),
    "mpnet far tokens, left padding": (
        "MPNetForSequenceClassification",
        # From a distance of 8 tokens share buckets, from 128 the last one. 0 is a token too.
        dict(TEXT | dict(max_position_embeddings=152), pad_token_id=0),
        Text(length=150, padding="left"),
    ),
    "modernbert": ("ModernBertForSequenceClassification", dict(MODERN), Text()),
    "modernbert mean, biases": (
        "ModernBertForSequenceClassification",
        dict(
            MODERN,
            **dict.fromkeys(["attention_bias", "mlp_bias", "norm_bias", "classifier_bias"], True),
            classifier_pooling="mean",
            hidden_activation="gelu_pytorch_tanh",
            classifier_activation="silu",
            layer_types=["sliding_attention", "full_attention", "full_attention"],
        ),
        Text(length=15, padding="left"),
    ),
    "modernbert all tokens": (
        "ModernBertForSequenceClassification",
        dict(MODERN, local_attention=64),
        Text(length=1, padding=None),
    ),
    "deberta-v2": ("DebertaV2ForSequenceClassification", dict(DEBERTA), Text()),
    "deberta-v2 projections of positions, absolute ones too": (
        "DebertaV2ForSequenceClassification",
        dict(
            DEBERTA,
            share_att_key=False,
            position_biased_input=True,
            type_vocab_size=3,
            norm_rel_ebd="none",
            position_buckets=-1,
            max_relative_positions=6,
            pooler_hidden_act="tanh",
        ),
        Text(length=15, token_types=True),
    ),
    "deberta-v2 one kind of scores": (
        "DebertaV2ForSequenceClassification",
        dict(DEBERTA, pos_att_type=["p2c"], share_att_key=False),
        Text(length=1, padding=None),
    ),
    "deberta-v2 without relative positions": (
        "DebertaV2ForSequenceClassification",
        dict(TEXT, pos_att_type=["c2p"], norm_rel_ebd="layer_norm"),
        Text(),
    ),
    "vit": ("ViTForImageClassification", dict(IMAGES, num_labels=5), None),
    "vit no qkv bias": (
        "ViTForImageClassification",
        dict(IMAGES, num_labels=5, qkv_bias=False, hidden_act="gelu_pytorch_tanh", num_channels=1),
        None,
    ),
    "vit oblong image": (
        "ViTForImageClassification",
        # 14 is no multiple of 4: two columns of pixels fill no patch.
        dict(IMAGES | dict(image_size=(8, 14), patch_size=(4, 4)), num_labels=5),
        None,
    ),
    "deit": ("DeiTForImageClassification", dict(IMAGES, num_labels=5, hidden_act="relu"), None),
    "dinov2": ("Dinov2ForImageClassification", DINOV2, None),
    "dinov2 swiglu": (
        "Dinov2ForImageClassification",
        dict(DINOV2, use_swiglu_ffn=True, qkv_bias=False, use_mask_token=False),
        None,
    ),
    "dinov2 with registers": (
        "Dinov2WithRegistersForImageClassification",
        dict(DINOV2, num_register_tokens=2, hidden_act="gelu_new"),
        None,
    ),
    "siglip": ("SiglipForImageClassification", dict(vision_config=IMAGES, num_labels=5), None),
    "siglip without pooling": (
        "SiglipForImageClassification",
        # 14 is no multiple of 4.
        dict(vision_config=IMAGES | dict(image_size=14, vision_use_head=False), num_labels=5),
        None,
    ),
}

OTHER_SIZES = [(8, 8), (20, 20), (24, 10), (12, 16), (14, 13), (6, 21)]
"""Height and width of images for models of images of 12 x 12 pixels."""


def images(config: PretrainedConfig, size: tuple[int, int] | None = None) -> np.ndarray:
    """A batch of 3 images of that height and width, or those of the config."""
    config = getattr(config, "vision_config", config)
    size = size or config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (3, config.num_channels, height, width)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def torch_batch(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def assert_close(actual: Any, expected: torch.Tensor) -> None:
    assert actual.shape == tuple(expected.shape)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected.detach().numpy(), rtol=0, atol=TOLERANCE)


def pooled(inner: Any, config: PretrainedConfig) -> torch.Tensor:
    """The input of the head, from the output of the model without it."""
    last = inner.last_hidden_state
    if config.model_type == "bert":
        return inner.pooler_output
    if config.model_type == "siglip":
        return last.mean(1)
    if config.model_type.startswith("dinov2"):
        patches = last[:, 1 + getattr(config, "num_register_tokens", 0) :]
        return torch.cat([last[:, 0], patches.mean(1)], -1)
    return last[:, 0]


@pytest.mark.parametrize("case", CASES)
def test_classifiers(case: str, tmp_path: Path) -> None:
    class_name, settings, text = CASES[case]
    model_class = getattr(transformers, class_name)
    # Other implementations give something else to padding in whose window there is no token.
    config = model_class.config_class(**settings, attn_implementation="eager")
    model = randomise(model_class(config))
    batch = text.batch(config) if text else {"pixel_values": images(config)}

    family = family_of(config)
    backbone, head = family.build_backbone(config), family.build_head(config)
    tensors = saved_parameters(model, tmp_path)

    @jax.jit
    def run(backbone_parameters: dict, complete_head: dict, batch: dict) -> tuple:
        outputs = backbone(backbone_parameters, batch, hidden_states=True)
        return outputs, head(complete_head, outputs)

    outputs, logits = run(parameters_of(backbone, tensors), parameters_of(head, tensors), batch)

    with torch.no_grad():
        expected = model(**torch_batch(batch), output_hidden_states=True)
        body = model.vision_model if config.model_type == "siglip" else model.base_model
        inner = body(**torch_batch(batch))
    assert_close(logits, expected.logits)
    assert len(outputs.hidden_states) == len(expected.hidden_states) == 4
    # A DeBERTa's padding sees padding too, and nothing sees it.
    compared = batch["attention_mask"] > 0 if "Deberta" in class_name else ...
    for actual, state in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        assert_close(actual[compared], state[compared])
    last = outputs.last_hidden_state, inner.last_hidden_state
    assert_close(*(state[compared] for state in last))
    assert_close(outputs.pooled, pooled(inner, config))
    assert family.inputs[0] in batch and set(batch) <= set(family.inputs)


@pytest.mark.parametrize("case", ["dinov2", "dinov2 with registers"])
def test_images_of_another_size_than_the_config_states(case: str, tmp_path: Path) -> None:
    """Positions are resized: each axis by itself, to fewer or more, without and with smoothing."""
    class_name, settings, _ = CASES[case]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**settings)
    model = randomise(model_class(config))
    family = family_of(config)
    backbone, head = family.build_backbone(config), family.build_head(config)
    tensors = saved_parameters(model, tmp_path)
    parameters, complete_head = parameters_of(backbone, tensors), parameters_of(head, tensors)
    for size in OTHER_SIZES:
        batch = {"pixel_values": images(config, size)}
        outputs = jax.jit(backbone)(parameters, batch)
        with torch.no_grad():
            expected = model(**torch_batch(batch))
            inner = model.base_model(**torch_batch(batch))
        assert_close(outputs.last_hidden_state, inner.last_hidden_state)
        assert_close(head(complete_head, outputs), expected.logits)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_vision(activation: str, tmp_path: Path) -> None:
    config = transformers.CLIPConfig(
        vision_config=dict(IMAGES, hidden_act=activation),
        text_config=dict(TEXT, eos_token_id=49, bos_token_id=48),
        projection_dim=10,
        num_labels=3,
    )
    model = randomise(transformers.CLIPModel(config))
    family = family_of(config)
    backbone, head = family.build_backbone(config), family.build_head(config)
    batch = {"pixel_values": images(config.vision_config)}
    token_ids = torch.arange(36).reshape(3, 12)
    with torch.no_grad():
        expected = model(input_ids=token_ids, **torch_batch(batch))
        features = model.get_image_features(**torch_batch(batch), output_hidden_states=True)

    @jax.jit
    def run(parameters: dict, complete_head: dict, batch: dict) -> tuple:
        outputs = backbone(parameters, batch, hidden_states=True)
        return outputs, head(complete_head, outputs)

    complete_head = {
        "text_embeddings": expected.text_embeds.numpy(),
        "logit_scale": model.logit_scale.detach().numpy(),
        "bias": np.zeros(len(expected.text_embeds), np.float32),
    }
    parameters = parameters_of(backbone, saved_parameters(model, tmp_path))
    outputs, logits = run(parameters, complete_head, batch)
    assert_close(logits, expected.logits_per_image)
    assert_close(outputs.pooled, features.pooler_output)
    assert_close(outputs.last_hidden_state, features.last_hidden_state)
    for actual, state in zip(outputs.hidden_states, features.hidden_states, strict=True):
        assert_close(actual, state)


@pytest.mark.parametrize(
    "model_type", ["bert", "electra", "mpnet", "roberta", "xlm-roberta", "camembert"]
)
@pytest.mark.parametrize("field", ["is_decoder", "add_cross_attention"])
def test_decoders_of_families_of_encoders_are_refused(model_type: str, field: str) -> None:
    config = transformers.AutoConfig.for_model(model_type, **TEXT, **{field: True})
    with pytest.raises(InputError, match=f"config.json: {field} is true, which .*{model_type}"):
        family_of(config).build_backbone(config)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    x = np.linspace(-6, 6, 1000, dtype=np.float32)
    expected = ACT2FN[name](torch.from_numpy(x))
    np.testing.assert_allclose(activation_of(name)(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        transformers.BertConfig(**TEXT, hidden_act="mish"),
        transformers.RobertaConfig(**TEXT, hidden_act="mish"),
        transformers.ElectraConfig(**TEXT, hidden_act="mish"),
        transformers.MPNetConfig(**TEXT, hidden_act="mish"),
        transformers.ModernBertConfig(**MODERN, hidden_activation="mish"),
        transformers.DebertaV2Config(**DEBERTA, hidden_act="mish"),
        transformers.ViTConfig(**IMAGES, hidden_act="mish"),
        transformers.DeiTConfig(**IMAGES, hidden_act="mish"),
        transformers.Dinov2Config(**IMAGES, hidden_act="mish"),
        transformers.SiglipConfig(vision_config=dict(IMAGES, hidden_act="mish")),
        transformers.CLIPConfig(vision_config=dict(IMAGES, hidden_act="mish")),
        transformers.T5Config(feed_forward_proj="mish"),
        transformers.LlamaConfig(**SIZES, hidden_act="mish"),
        transformers.Gemma2Config(**SIZES, hidden_activation="mish"),
    ],
)
def test_unknown_activations_are_refused(config: PretrainedConfig) -> None:
    with pytest.raises(InputError, match=r"config.json: activation 'mish' is not .* are gelu, "):
        family_of(config).build_backbone(config)


@pytest.mark.parametrize("end_of_text", [2, 40])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_clip_text(end_of_text: int, padding: str, tmp_path: Path) -> None:
    text_config = dict(TEXT, eos_token_id=end_of_text, bos_token_id=48, pad_token_id=1)
    config = transformers.CLIPConfig(
        vision_config=IMAGES, text_config=text_config, projection_dim=10
    )
    model = randomise(transformers.CLIPModel(config))
    batch = Text(length=13, padding=padding).batch(config.text_config)
    # Two of them in the row without padding: the first counts.
    batch["input_ids"][:, 6] = batch["input_ids"][0, 9] = 40
    network = text_network(config)
    parameters = parameters_of(network, saved_parameters(model, tmp_path))
    with torch.no_grad():
        expected = model.get_text_features(**torch_batch(batch)).pooler_output
    assert_close(jax.jit(network)(parameters, batch), expected)


def test_batch_without_mask_and_types(tmp_path: Path) -> None:
    config = transformers.BertConfig(**TEXT)
    backbone = family_of(config).build_backbone(config)
    model = randomise(transformers.BertForSequenceClassification(config))
    parameters = parameters_of(backbone, saved_parameters(model, tmp_path))
    batch = Text(padding=None).batch(config)
    token_ids = {"input_ids": batch["input_ids"]}
    run = jax.jit(backbone)
    np.testing.assert_array_equal(
        run(parameters, token_ids).pooled, run(parameters, batch).pooled, strict=True
    )
    assert run(parameters, token_ids).hidden_states is None


@pytest.mark.parametrize(
    "model_type",
    [
        *("bert", "electra", "mpnet", "roberta", "modernbert", "deberta-v2"),
        *("vit", "clip", "dinov2", "dinov2_with_registers", "siglip"),
    ],
)
def test_outputs_have_the_dtype_of_the_parameters(model_type: str) -> None:
    config = transformers.AutoConfig.for_model(model_type)
    backbone = family_of(config).build_backbone(config)
    parameters = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)
        for name, leaf in backbone.shapes.items()
    }
    batch = (
        {"pixel_values": jax.ShapeDtypeStruct((2, 3, 224, 224), jnp.float32)}
        if model_type in ("vit", "clip", "dinov2", "dinov2_with_registers", "siglip")
        else {"input_ids": jax.ShapeDtypeStruct((2, 12), jnp.int32)}
    )
    outputs = jax.eval_shape(backbone, parameters, batch)
    assert outputs.pooled.dtype == outputs.last_hidden_state.dtype == jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Merge:
    """A merge of two experts in random proportions, and what PyTorch makes of it in float64."""

    config: PretrainedConfig
    parameters: dict[str, np.ndarray]
    head: dict[str, np.ndarray]
    deltas: dict[str, DenseDelta]
    scales: dict[str, np.ndarray]
    batch: dict[str, np.ndarray]
    expected_logits: torch.Tensor
    expected_gradients: dict[str, np.ndarray]


MERGES = {
    "bert": transformers.BertConfig(**TEXT),
    # Norms of some layers alone. The window of padding reaches a token, without which PyTorch gives
    # NaN in float64.
    "deberta-v2": transformers.DebertaV2Config(**DEBERTA | {"share_att_key": False}),
    "modernbert": transformers.ModernBertConfig(**MODERN | {"local_attention": 12}, norm_bias=True),
}


def scale_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """One coefficient per row of a matrix and expert, one per vector and expert."""
    layers, shape = (shape[:1], shape[1:]) if is_stacked(name) else ((), shape)
    return (*layers, 2, *((shape[0], 1) if len(shape) == 2 else (1,)))


@pytest.fixture(scope="module")
def merge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Merge:
    config = MERGES[request.param]
    make = partial(
        transformers.AutoModelForSequenceClassification.from_config, attn_implementation="eager"
    )
    base, *experts = (randomise(make(config), seed) for seed in range(3))
    folder = tmp_path_factory.mktemp("merge")
    tensors = [
        saved_parameters(model, folder / str(position))
        for position, model in enumerate([base, *experts])
    ]
    family = family_of(config)
    backbone, head = family.build_backbone(config), family.build_head(config)
    base_parameters, *expert_parameters = (parameters_of(backbone, each) for each in tensors)
    generator = np.random.default_rng(0)
    scales = {
        name: generator.uniform(0, 0.6, scale_shape(name, leaf.shape)).astype(np.float32)
        for name, leaf in base_parameters.items()
    }
    batch = Text(token_types=getattr(config, "type_vocab_size", 0) > 0).batch(config)

    reference_scales = {
        name: torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        for name, scale in scales.items()
    }
    merged = {name: torch.from_numpy(tensor).double() for name, tensor in tensors[0].items()}
    for name, scale in reference_scales.items():
        pairs = (
            zip(unstack(name, len(scale)), scale, strict=True)
            if is_stacked(name)
            else [(name, scale)]
        )
        for each, coefficients in pairs:
            start = torch.from_numpy(tensors[0][each]).double()
            for coefficient, expert in zip(coefficients, tensors[1:], strict=True):
                merged[each] = merged[each] + coefficient * (torch.from_numpy(expert[each]) - start)
    logits = functional_call(base.double(), merged, kwargs=torch_batch(batch)).logits
    logits.square().sum().backward()

    return Merge(
        config=config,
        parameters=base_parameters,
        head=parameters_of(head, tensors[0]),
        deltas=task_vectors(base_parameters, expert_parameters),
        scales=scales,
        batch=batch,
        expected_logits=logits,
        expected_gradients={name: scale.grad.numpy() for name, scale in reference_scales.items()},
    )


# All layers are scanned and computed again in one place, whatever the model.
@pytest.mark.parametrize(
    ("merge", "rematerialize"),
    [
        *(("bert", mode) for mode in ("nothing", "weights", "elementwise", "layer")),
        *((name, "elementwise") for name in MERGES if name != "bert"),
    ],
    indirect=["merge"],
    scope="module",
)
def test_mixtures_and_their_gradients(rematerialize: Rematerialize, merge: Merge) -> None:
    """A backbone of Mixtures against PyTorch in float64, which merges first and differentiates.

    The tolerance on gradients is relative to the largest one: they are sums of products over
    whole rows, whose rounding in float32 is relative to the largest terms.
    """
    family = family_of(merge.config)
    backbone = family.build_backbone(merge.config, rematerialize)
    head = family.build_head(merge.config)

    def loss(
        scales: dict, parameters: dict, deltas: dict, complete_head: dict, batch: dict
    ) -> tuple:
        mixtures = {
            name: Mixture(leaf, deltas[name], scales[name]) for name, leaf in parameters.items()
        }
        logits = head(complete_head, backbone(mixtures, batch))
        return jnp.square(logits).sum(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(
        merge.scales, merge.parameters, merge.deltas, merge.head, merge.batch
    )
    assert_close(logits, merge.expected_logits)
    assert gradients.keys() == merge.expected_gradients.keys()
    largest = max(np.abs(expected).max() for expected in merge.expected_gradients.values())
    for name, expected in merge.expected_gradients.items():
        np.testing.assert_allclose(
            gradients[name], expected, rtol=0, atol=1e-5 * largest, err_msg=name
        )
