"""Zero-shot heads against the same computation with the PyTorch model of `transformers`."""

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from adamerge_jax.errors import InputError
from adamerge_jax.models import family_of, zero_shot
from adamerge_jax.models.zero_shot import text_network, zero_shot_head
from tests.references import (
    clip_config,
    clip_tokenizer,
    parameters_of,
    randomise,
    saved_parameters,
)

CLASS_NAMES = ["cat", "dog", "a bird {of} prey"]
TEMPLATES = ["a photo of a {}.", "{}", "the {}, or a {}."]


@pytest.fixture
def tokenizer(tmp_path: Path) -> CLIPTokenizer:
    return clip_tokenizer(tmp_path)


@pytest.fixture
def config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    return clip_config(tokenizer)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_zero_shot_head(
    config: CLIPConfig,
    tokenizer: CLIPTokenizer,
    batch_size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 9 sentences: with batches of 2, the last one is filled up.
    monkeypatch.setattr(zero_shot, "BATCH_SIZE", batch_size)
    model = randomise(CLIPModel(config))
    network = text_network(config)
    parameters = parameters_of(network, saved_parameters(model, tmp_path))
    head = zero_shot_head(config, parameters, tokenizer, CLASS_NAMES, TEMPLATES)

    expected = []
    for name in CLASS_NAMES:
        sentences = [f"a photo of a {name}.", name, f"the {name}, or a {name}."]
        tokens = tokenizer(sentences, padding=True, return_tensors="pt")
        with torch.no_grad():
            features = model.get_text_features(**tokens).pooler_output
        mean = torch.nn.functional.normalize(features, dim=-1).mean(0)
        expected.append(torch.nn.functional.normalize(mean, dim=-1).numpy())
    assert head.keys() == {"text_embeddings", "logit_scale", "bias"}
    # Vectors of length 1, computed in float32 on both sides.
    np.testing.assert_allclose(head["text_embeddings"], np.stack(expected), atol=1e-5)
    assert head["text_embeddings"].shape == (3, 10)
    assert float(head["logit_scale"]) == model.logit_scale.item()
    assert head["bias"].tolist() == [0, 0, 0]


def test_one_template_is_clip_itself(
    config: CLIPConfig, tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    model = randomise(CLIPModel(config))
    tensors = saved_parameters(model, tmp_path)
    family = family_of(config)
    backbone = family.build_backbone(config)
    parameters = parameters_of(text_network(config), tensors)
    complete_head = zero_shot_head(config, parameters, tokenizer, CLASS_NAMES, ["{}"])
    pixels = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    outputs = jax.jit(backbone)(parameters_of(backbone, tensors), {"pixel_values": pixels})
    logits = family.build_head(config)(complete_head, outputs)
    with torch.no_grad():
        expected = model(
            **tokenizer(CLASS_NAMES, padding=True, return_tensors="pt"),
            pixel_values=torch.from_numpy(pixels),
        ).logits_per_image
    np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("class_names", "templates", "message"),
    [
        ([], TEMPLATES, "class_names: is empty"),
        (CLASS_NAMES, [], "templates: is empty"),
        (CLASS_NAMES, ["a {}", "a photo"], r"templates: 'a photo' has no \{\}"),
        (["cat", "z" * 60], ["{}"], r"'z{60}' has 62 tokens.* reads 48"),
    ],
)
def test_unusable_names_and_templates(
    config: CLIPConfig,
    tokenizer: CLIPTokenizer,
    class_names: list[str],
    templates: list[str],
    message: str,
) -> None:
    parameters = {name: None for name in text_network(config).shapes}
    with pytest.raises(InputError, match=message):
        zero_shot_head(config, parameters, tokenizer, class_names, templates)
