"""Classifiers of images from end to end, those of a DINOv2 with images of another size as well."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import (
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
)

from adamerge_jax.pipeline.example_loader import image_shape
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.pipeline.run_learn import learn
from adamerge_jax.pipeline.run_merge import merge
from adamerge_jax.plan.outline import outline
from adamerge_jax.recipes.loading import parse_recipe
from tests.references import EXPORT, LEARNING, fine_tune, randomise, save_image

CONFIG = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
CONFIG |= dict(image_size=20, patch_size=4, mlp_ratio=2)
TASKS = ("shape", "colour")
IMAGES = 12
"""Images of a task."""

TOWER = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
SIGLIP = dict(
    text_config=dict(TOWER, vocab_size=40, bos_token_id=0, eos_token_id=1),
    vision_config=dict(TOWER, image_size=8, patch_size=4),
)


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe for a DINOv2 whose images are cut to 12 x 8 pixels; experts are wrong about one."""
    root = tmp_path_factory.mktemp("sizes")
    processor = BitImageProcessorPil(size={"shortest_edge": 14}, crop_size=dict(height=12, width=8))
    base = randomise(Dinov2Model(Dinov2Config(**CONFIG)))
    base.save_pretrained(root / "base")
    processor.save_pretrained(root / "base")
    tasks = {}
    for seed, task in enumerate(TASKS, start=1):
        expert = fine_tune(Dinov2ForImageClassification(Dinov2Config(**CONFIG)), base, seed)
        expert.save_pretrained(root / task)
        generator = np.random.default_rng(seed)
        for number in range(IMAGES):
            pixels = generator.integers(0, 256, (16, 18, 3))
            image = Image.fromarray(pixels.astype(np.uint8))
            with torch.no_grad():
                logits = expert(**processor(image, return_tensors="pt")).logits
            label = logits.argmax().item() if number else logits.argmin().item()
            save_image(root / "images" / task / f"LABEL_{label}" / f"{number}.png", pixels)
        source = str(root / "images" / task)
        tasks[task] = {
            "expert": str(root / task),
            "calibration": source,
            "test": {"path": source, "label": "label"},
        }
    learning = copy.deepcopy(LEARNING)
    return {
        "base": str(root / "base"),
        "tasks": tasks,
        "coefficients": {"granularity": "head"},
        "learning": learning,
        "export": EXPORT,
    }


def test_experts_have_the_accuracy_that_transformers_gives_them(fields, tmp_path):
    run = learn(
        parse_recipe(fields), root=Path("/"), out=tmp_path / "run", console=Console(quiet=True)
    )
    experts = next(row for row in run.rows if row.kind == "experts")
    assert experts.tasks == pytest.approx(dict.fromkeys(TASKS, 1 - 1 / IMAGES))


def test_a_plan_is_for_images_of_that_size(fields):
    recipe = parse_recipe(fields)
    assert image_shape(open_models(recipe, Path("/"))) == (3, 12, 8)
    inputs = outline(recipe, Path("/")).inputs(4, 0)
    assert inputs["pixel_values"].shape == (4, 3, 12, 8)


def test_a_whole_siglip_is_the_base_of_classifiers(tmp_path):
    """With one expert, whose coefficient is 1, the merge is that expert beside the base's texts."""
    base = randomise(SiglipModel(SiglipConfig(**SIGLIP)))
    base.save_pretrained(tmp_path / "base")
    expert = fine_tune(SiglipForImageClassification(SiglipConfig(**SIGLIP, num_labels=3)), base, 1)
    expert.save_pretrained(tmp_path / "expert")
    pixels = np.random.default_rng(0).normal(size=(6, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "images.npz", pixel_values=pixels)
    tasks = {"a": {"expert": "expert", "calibration": "images.npz"}}
    recipe = parse_recipe({"base": "base", "tasks": tasks, "export": EXPORT})
    assert not open_models(recipe, tmp_path).family.bridged
    quiet, out = Console(quiet=True), tmp_path / "out"
    merge(recipe, "task_arithmetic", {"coefficient": 1.0}, root=tmp_path, out=out, console=quiet)
    merged = SiglipForImageClassification.from_pretrained(out / "checkpoint" / "tasks" / "a").eval()
    with torch.no_grad():
        logits, expected = (
            m(pixel_values=torch.from_numpy(pixels)).logits for m in (merged, expert)
        )
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    texts = SiglipModel.from_pretrained(out / "checkpoint").text_model.state_dict()
    for name, tensor in base.text_model.state_dict().items():
        torch.testing.assert_close(texts[name], tensor, rtol=0, atol=0)
