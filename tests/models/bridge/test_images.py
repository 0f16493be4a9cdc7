"""Images among tokens in PyTorch forwards of several kinds, against PyTorch itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.core_model_loading import revert_weight_conversion

from adamerge_jax.models.bridge.family import bridged_family
from adamerge_jax.models.family import complete_head
from adamerge_jax.models.images_in_text import COUNT, PIXELS, SIZES
from tests.references import randomise

IMAGE = 5
"""The token that stands for a piece of an image."""

TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 2,
}


def gemma3() -> PreTrainedModel:
    """Tokens of an image see one another; masks are made of more than one rule."""
    text = TEXT | {"sliding_window": 4, "query_pre_attn_scalar": 8}
    config = Gemma3Config(
        text_config=text | {"layer_types": ["sliding_attention"]},
        vision_config=VISION | {"vision_use_head": False},
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
    )
    return Gemma3ForConditionalGeneration(config)


def qwen3_vl() -> PreTrainedModel:
    """Images have grids, and features that are added to the first layers."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "out_hidden_size": 16,
        "num_heads": 2,
        "patch_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "spatial_merge_size": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=6,
    )
    return Qwen3VLForConditionalGeneration(config)


def smolvlm() -> PreTrainedModel:
    """Images have an axis of texts, and those of zeros only are taken for padding."""
    config = SmolVLMConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=VISION,
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return SmolVLMForConditionalGeneration(config)


def gemma4() -> PreTrainedModel:
    """Patches have places in images; tokens of an image see one another."""
    text = TEXT | {"sliding_window": 4, "global_head_dim": 8, "vocab_size_per_layer_input": 32}
    text |= {"hidden_size_per_layer_input": 4, "num_kv_shared_layers": 0}
    vision = VISION | {"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16}
    config = Gemma4Config(
        text_config=text
        | {"layer_types": ["full_attention"], "use_bidirectional_attention": "vision"},
        vision_config=vision | {"pooling_kernel_size": 2, "default_output_length": 4},
        audio_config=None,
        image_token_id=IMAGE,
    )
    return Gemma4ForConditionalGeneration(config)


def mistral3() -> PreTrainedModel:
    """Patches of an image are joined by its size in pixels."""
    config = Mistral3Config(
        text_config=TEXT | {"model_type": "mistral"},
        vision_config=VISION | {"model_type": "pixtral", "head_dim": 8},
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return Mistral3ForConditionalGeneration(config)


def llava() -> PreTrainedModel:
    """Its vision tower takes no sizes, although the model does."""
    config = LlavaConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=VISION | {"model_type": "clip_vision_model"},
        image_token_index=IMAGE,
    )
    return LlavaForConditionalGeneration(config)


PINPOINTS = [[16, 8], [8, 16]]
"""The sizes to which tiles of 8 x 8 pixels are put together."""


def llava_next() -> PreTrainedModel:
    """Images are cut into tiles, whose padding is left out by the image's size."""
    config = LlavaNextConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=VISION | {"model_type": "clip_vision_model"},
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaNextForConditionalGeneration(config)


def llava_onevision() -> PreTrainedModel:
    """Images are cut into tiles where their conversation has one image."""
    config = LlavaOnevisionConfig(
        text_config=TEXT | {"model_type": "qwen2"},
        vision_config=VISION
        | {"model_type": "siglip_vision_model", "patch_size": 4, "vision_use_head": False},
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaOnevisionForConditionalGeneration(config)


class Kind(NamedTuple):
    """A model that reads images.

    Attributes:
        make: Makes it.
        shape: The shape of an image's array.
        tokens: The tokens that stand for an image.
        given: The arguments of PyTorch's forward for the images of one text, `[images, *shape]`.
        size: The size of an image before it is cut into tiles.
        most: The images of a text at most.
    """

    make: Callable[[], PreTrainedModel]
    shape: tuple[int, ...]
    tokens: int
    given: Callable[[torch.Tensor], dict[str, Any]]
    size: tuple[int, int] | None = None
    most: int = 2


def places(images: torch.Tensor) -> dict[str, Any]:
    """Returns the patches of images, with two more as padding, and the places of all."""
    patches = torch.nn.functional.pad(images.flatten(1, 3), (0, 0, 0, 4))
    at = [[column, row] for row in range(4) for column in range(4)] + [[-1, -1]] * 4
    return {PIXELS: patches, "image_position_ids": torch.tensor([at] * len(images))}


KINDS = {
    "gemma3": Kind(gemma3, (3, 8, 8), 4, lambda images: {PIXELS: images}),
    "gemma4": Kind(gemma4, (1, 4, 4, 12), 4, places),
    "qwen3_vl": Kind(
        qwen3_vl,
        (1, 4, 4, 24),
        4,
        lambda images: {
            PIXELS: images.reshape(-1, 24),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * len(images)),
        },
    ),
    "smolvlm": Kind(smolvlm, (3, 8, 8), 4, lambda images: {PIXELS: images[None]}),
    "llava": Kind(llava, (3, 8, 8), 16, lambda images: {PIXELS: images}),
    "mistral3": Kind(
        mistral3,
        (3, 4, 8),
        2,
        lambda images: {PIXELS: images, SIZES: torch.tensor([[4, 8]] * len(images))},
    ),
    # 4 x 4 patches of the whole image and 4 x 8 of its tiles, of which two rows are padding and are
    # left out; each of the others has a token of a new line behind it.
    "llava_next": Kind(
        llava_next,
        (3, 3, 8, 8),
        16 + 2 * 8 + 2,
        lambda images: {PIXELS: images, SIZES: torch.tensor([[4, 16]] * len(images))},
        size=(4, 16),
    ),
    "llava_onevision": Kind(
        llava_onevision,
        (3, 3, 8, 8),
        4 + 4 * 2 + 4,
        lambda images: {PIXELS: images, SIZES: torch.tensor([[12, 4]])},
        size=(12, 4),
        most=1,
    ),
    "llava_onevision, whole": Kind(
        llava_onevision,
        (1, 3, 8, 8),
        4 + 1,
        lambda images: {
            PIXELS: images,
            SIZES: torch.tensor([[12, 4]] * 2),
            "batch_num_images": torch.tensor([2]),
        },
        size=(12, 4),
    ),
}


TYPES_OF_TOKENS = {
    "gemma3": "token_type_ids",
    "gemma4": "mm_token_type_ids",
    "qwen3_vl": "mm_token_type_ids",
}
"""The argument that is 1 for tokens of images, by model."""


def rows_of(kind: Kind) -> list[list[int]]:
    """Returns texts with the most images, with one and with none."""
    image = [IMAGE] * kind.tokens
    first = [1, 3, *image, 4, 10, *(image if kind.most == 2 else [9, 8]), 2]
    return [first, [1, 9, *image, 4, 11], [1, 8, 9, 10, 11]]


@pytest.mark.parametrize("name", KINDS)
def test_logits_and_gradient_are_pytorchs(name):
    kind, differentiated = KINDS[name], name == "qwen3_vl"
    model = randomise(kind.make())
    rows = rows_of(kind)
    if name == "llava_onevision, whole":
        rows = [rows[0], rows[2]]
    config = model.config
    family = bridged_family(config, type(model).__name__)
    assert family.images is not None, family.blind
    assert family.max_tokens(config) == 96
    backbone, head = family.build_backbone(config), family.build_head(config)
    by_name = revert_weight_conversion(model, dict(model.state_dict(keep_vars=True)))
    parameters = {n: jnp.asarray(by_name[n].detach().numpy()) for n in backbone.shapes}
    has_grids = name == "qwen3_vl"
    generator = np.random.default_rng(0)
    pixels = generator.normal(size=(len(rows), kind.most, *kind.shape)).astype(np.float32)
    counts = [row.count(IMAGE) // kind.tokens for row in rows]
    length = max(map(len, rows))
    inputs: dict[str, Any] = {
        "input_ids": np.array([row + [0] * (length - len(row)) for row in rows], np.int32),
        "attention_mask": np.array(
            [[1] * len(row) + [0] * (length - len(row)) for row in rows], np.int32
        ),
        COUNT: np.array(counts, np.int32),
        PIXELS: pixels,
    }
    if kind.size is not None:
        inputs[SIZES] = np.zeros((len(rows), 0, *kind.size), np.float32)
    if has_grids:
        positions = [family.images.positions(row, (1, 4, 4)) for row in rows]
        inputs["position_ids"] = np.stack(
            [np.pad(p, [(0, 0), (0, length - p.shape[1])]) for p in positions]
        )
    weights = inputs["attention_mask"][..., None] * np.linspace(-1, 1, 32, dtype=np.float32)

    @jax.jit
    def run(parameters, inputs):
        def total(parameters):
            logits = head(complete_head(head, {}, parameters), backbone(parameters, inputs))
            return (logits * weights).sum(), logits

        if not differentiated:  # which takes the most time
            return {}, total(parameters)[1]
        return jax.grad(total, has_aux=True)(parameters)

    gradients, logits = run(parameters, inputs)

    model.requires_grad_(True)
    total: Any = 0.0
    for place, (row, count) in enumerate(zip(rows, counts, strict=True)):
        ids = torch.tensor([row])
        given: dict[str, Any] = {"input_ids": ids}
        if name in TYPES_OF_TOKENS:
            given[TYPES_OF_TOKENS[name]] = (ids == IMAGE).int()
        if count:
            given |= kind.given(torch.tensor(pixels[place, :count]))
        expected = model(**given).logits[0]
        # float32 on both sides, of logits up to 10
        np.testing.assert_allclose(
            logits[place, : len(row)], expected.detach().numpy(), atol=5e-5, rtol=1e-5
        )
        total = total + (expected * torch.tensor(weights[place, : len(row)])).sum()
    if not differentiated:
        return
    total.backward()
    largest = max(np.abs(g).max() for g in gradients.values())
    in_vision = 0
    for name, gradient in gradients.items():
        expected_gradient = by_name[name].grad
        if expected_gradient is None:  # of a part that no logit depends on
            assert not np.any(gradient), name
            continue
        np.testing.assert_allclose(
            gradient, expected_gradient.numpy(), atol=2e-5 * largest, err_msg=name
        )
        in_vision += "vis" in name and bool(np.abs(gradient).max() > 1e-3 * largest)
    assert in_vision > 4
