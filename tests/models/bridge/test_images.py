"""Images among tokens in PyTorch forwards of several kinds, against PyTorch itself."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.core_model_loading import revert_weight_conversion

from adamerge_jax.models.bridge.family import bridged_family
from adamerge_jax.models.family import complete_head
from adamerge_jax.models.images_in_text import COUNT, PIXELS
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
    "max_position_embeddings": 64,
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


KINDS = {"gemma3": gemma3, "qwen3_vl": qwen3_vl, "smolvlm": smolvlm}

PIECE = [IMAGE] * 4

ROWS = [
    [1, 3, *PIECE, 4, 10, *PIECE, 2],
    [1, 9, *PIECE, 4, 11],
    [1, 8, 9, 10, 11],
]
"""Conversations with two images, one and none."""


@pytest.mark.parametrize(
    ("kind", "differentiated"), [("gemma3", False), ("qwen3_vl", True), ("smolvlm", False)]
)
def test_logits_and_gradient_are_pytorchs(kind, differentiated):
    model = randomise(KINDS[kind]())
    config = model.config
    family = bridged_family(config, type(model).__name__)
    assert family.images is not None and family.max_tokens(config) == 64
    backbone, head = family.build_backbone(config), family.build_head(config)
    by_name = revert_weight_conversion(model, dict(model.state_dict(keep_vars=True)))
    parameters = {n: jnp.asarray(by_name[n].detach().numpy()) for n in backbone.shapes}
    has_grids = kind == "qwen3_vl"
    generator = np.random.default_rng(0)
    shape = (1, 4, 4, 24) if has_grids else (3, 8, 8)
    pixels = generator.normal(size=(len(ROWS), 2, *shape)).astype(np.float32)
    counts = [row.count(IMAGE) // len(PIECE) for row in ROWS]
    length = max(map(len, ROWS))
    inputs: dict[str, Any] = {
        "input_ids": np.array([row + [0] * (length - len(row)) for row in ROWS], np.int32),
        "attention_mask": np.array(
            [[1] * len(row) + [0] * (length - len(row)) for row in ROWS], np.int32
        ),
        COUNT: np.array(counts, np.int32),
        PIXELS: pixels,
    }
    if has_grids:
        positions = [family.images.positions(row, (1, 4, 4)) for row in ROWS]
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
    for place, (row, count) in enumerate(zip(ROWS, counts, strict=True)):
        ids = torch.tensor([row])
        given: dict[str, Any] = {"input_ids": ids}
        images = torch.tensor(pixels[place, :count])
        if kind == "gemma3":
            given["token_type_ids"] = (ids == IMAGE).int()
        if count and has_grids:
            given |= {
                PIXELS: images.reshape(-1, 24),
                "image_grid_thw": torch.tensor([[1, 4, 4]] * count),
                "mm_token_type_ids": (ids == IMAGE).int(),
            }
        elif count:
            given[PIXELS] = images[None] if kind == "smolvlm" else images
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
