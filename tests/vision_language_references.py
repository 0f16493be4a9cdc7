"""Tiny vision-language models, their processors, and conversations with images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from tests.language_references import SPECIAL, byte_tokenizer
from tests.references import randomise, save_image, write_json_lines

TASKS = ("colours", "shapes")

ANSWERS = {"colours": ("red", "green", "blue"), "shapes": ("the cat", "the dog", "the fox")}

IMAGE_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
"""A template as Qwen2-VL's is."""


def image_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer with tokens for images."""
    return byte_tokenizer(chat_template=template, tokens=[*SPECIAL, *IMAGE_TOKENS])


def qwen2_vl(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> PreTrainedModel:
    """A Qwen2-VL of a width of 32, with a layer of text and one of vision."""
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "in_channels": 3,
            "spatial_merge_size": 2,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return randomise(Qwen2VLForConditionalGeneration(config), seed)


def changed(base: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A copy whose weights are changed at random, those of text and of vision."""
    generator = torch.Generator().manual_seed(seed)
    expert = type(base)(base.config)
    expert.load_state_dict(base.state_dict())
    with torch.no_grad():
        for parameter in expert.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.1 * parameter.std() * noise
    return expert.eval()


def save_vision_language(root: Path) -> dict[str, Any]:
    """Saves a base, an expert for each of `TASKS`, and conversations with images.

    Returns:
        The fields of a recipe.
    """
    tokenizer = image_tokenizer()
    base = qwen2_vl(tokenizer)
    processor = Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=1024)
    base.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    processor.save_pretrained(root / "base")
    tasks = {}
    for seed, task in enumerate(TASKS, start=1):
        changed(base, seed).save_pretrained(root / task)
        file = write_json_lines(root / f"{task}.jsonl", rows(root, task, seed))
        tasks[task] = {"expert": str(root / task), "calibration": str(file), "test": str(file)}
    return {"base": str(root / "base"), "tasks": tasks, "max_length": 96, "image_size": [16, 24]}


def rows(root: Path, task: str, seed: int, count: int = 8) -> list[dict[str, Any]]:
    """Conversations with one image, every fourth with two, every fifth with none."""
    generator = np.random.default_rng(seed)
    (root / "images").mkdir(exist_ok=True)
    made = []
    for number in range(count):
        names = [f"images/{task}{number}.png"]
        if number % 4 == 3:
            names.append(f"images/{task}0.png")
        if number % 5 == 4:
            names = []
        for name in names[:1]:
            size = (20 + number, 30, 3)
            save_image(root / name, generator.integers(0, 256, size).astype(np.uint8))
        answer = ANSWERS[task][number % len(ANSWERS[task])]
        made.append(conversation(names, "which one is it ?", answer))
    return made


def conversation(images: Sequence[str], question: str, answer: str) -> dict[str, Any]:
    """A row with a question about images and its answer."""
    parts = [{"type": "image", "image": name} for name in images]
    return {
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    }
