"""A batch that does not fit the config is refused when the model is traced."""

from collections.abc import Mapping

import jax
import numpy as np
import pytest
from transformers import (
    BertConfig,
    CLIPConfig,
    CvtConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    MPNetConfig,
    PretrainedConfig,
    ResNetConfig,
    RobertaConfig,
    SiglipConfig,
    ViTConfig,
)

from adamerge_jax.errors import InputError
from adamerge_jax.models import family_of
from adamerge_jax.models.family import Network
from adamerge_jax.models.inputs import stated_image_shape
from adamerge_jax.models.zero_shot import text_network

SIZES = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
TEXT = dict(vocab_size=20, max_position_embeddings=10, **SIZES)
VIT = ViTConfig(image_size=8, patch_size=4, **SIZES)
CLIP = CLIPConfig(
    vision_config=dict(image_size=8, patch_size=4, **SIZES),
    text_config=dict(TEXT, eos_token_id=19, bos_token_id=18),
)
DEIT = DeiTConfig(image_size=8, patch_size=4, **SIZES)
SIGLIP = SiglipConfig(vision_config=dict(image_size=8, patch_size=4, **SIZES))


def trace(network: Network, inputs: Mapping[str, np.ndarray]) -> None:
    jax.eval_shape(network, network.shapes, inputs)


def tokens(length: int) -> dict[str, np.ndarray]:
    return {"input_ids": np.ones((2, length), np.int32)}


@pytest.mark.parametrize(
    ("network", "longest"),
    [
        (family_of(config).build_backbone(config), longest)
        # The first positions of RoBERTa and MPNet, up to that of padding, are those of no token.
        for config, longest in [
            (BertConfig(**TEXT), 10),
            (RobertaConfig(**TEXT), 8),
            (MPNetConfig(**TEXT), 8),
        ]
    ]
    + [(text_network(CLIP), 10)],
    ids=["bert", "roberta", "mpnet", "clip text"],
)
def test_sequences_longer_than_the_positions(network: Network, longest: int) -> None:
    trace(network, tokens(longest))
    with pytest.raises(InputError, match=rf"have {longest + 1} tokens.* positions for {longest}"):
        trace(network, tokens(longest + 1))


@pytest.mark.parametrize("config", [VIT, CLIP, DEIT, SIGLIP], ids=["vit", "clip", "deit", "siglip"])
@pytest.mark.parametrize("shape", [(3, 8, 12), (3, 4, 8), (1, 8, 8)])
def test_images_of_another_size(config: PretrainedConfig, shape: tuple[int, ...]) -> None:
    network = family_of(config).build_backbone(config)
    trace(network, {"pixel_values": np.zeros((2, 3, 8, 8), np.float32)})
    pattern = rf"\({', '.join(map(str, shape))}\).*expects \(3, 8, 8\)"
    with pytest.raises(InputError, match=pattern):
        trace(network, {"pixel_values": np.zeros((2, *shape), np.float32)})


@pytest.mark.parametrize("kind", [Dinov2Config, Dinov2WithRegistersConfig])
def test_images_of_a_model_that_reads_any_size(kind: type[PretrainedConfig]) -> None:
    config = kind(image_size=8, patch_size=4, **SIZES)
    network = family_of(config).build_backbone(config)
    trace(network, {"pixel_values": np.zeros((2, 3, 4, 21), np.float32)})
    with pytest.raises(InputError, match=r"have 12 x 3 pixels, less than a patch .*, 4 x 4"):
        trace(network, {"pixel_values": np.zeros((2, 3, 12, 3), np.float32)})
    with pytest.raises(InputError, match=r"\(1, 8, 8\).*expects \(3, 8, 8\)"):
        trace(network, {"pixel_values": np.zeros((2, 1, 8, 8), np.float32)})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": (8, 12)}, r"image_size .*8, 12.* make 6 patches; expected a square number"),
        ({"mlp_ratio": 0}, "mlp_ratio is 0, hidden_size 8; expected a product above 0"),
        ({"mlp_ratio": 2**30}, "mlp_ratio is 1073741824, hidden_size 8; expected a product above"),
        ({"patch_size": (4, 2)}, "patch_size is 4 x 2"),
    ],
)
def test_configs_of_no_dinov2(fields: dict, message: str) -> None:
    config = Dinov2Config(**dict(image_size=8, patch_size=4, **SIZES) | fields)
    with pytest.raises(InputError, match=message):
        family_of(config).build_backbone(config)


def test_oblong_patches() -> None:
    config = ViTConfig(image_size=8, patch_size=(4, 2), **SIZES)
    with pytest.raises(InputError, match="patch_size is 4 x 2"):
        family_of(config).build_backbone(config)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (ViTConfig(image_size=16, num_channels=1), (1, 16, 16)),
        (ViTConfig(image_size=[16, 24]), (3, 16, 24)),
        (PretrainedConfig(image_size={"height": 16, "width": 24}), (3, 16, 24)),
        (CLIPConfig(vision_config={"image_size": 48}), (3, 48, 48)),
        (PretrainedConfig(input_size=[3, 16, 24]), (3, 16, 24)),
        (ResNetConfig(), None),
        (CvtConfig(), None),
    ],
)
def test_the_images_that_a_config_states(config, shape):
    assert stated_image_shape(config) == shape
