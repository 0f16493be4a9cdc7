"""An expert that is right on all examples has an accuracy of 1, however the data name classes."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from adamerge_jax.errors import InputError
from adamerge_jax.pipeline.workspace import open_workspace
from adamerge_jax.recipes.loading import parse_recipe
from tests.references import (
    VIT,
    fine_tune,
    predictions,
    randomise,
    save_image,
    sentences,
    write_json_lines,
)

NAMES = ["sport", "politics", "art"]
"""The classes of the expert's outputs, which no list of names sorts so."""


@pytest.fixture
def recipe(text_recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe of one task: its expert names its outputs, and gives all classes to the texts."""
    task = text_recipe["tasks"]["topic"]
    tokenizer = AutoTokenizer.from_pretrained(task["expert"])
    expert = BertForSequenceClassification.from_pretrained(task["expert"]).eval()
    texts = sentences(24, 0)
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expert.classifier.bias -= expert(**encoded).logits.mean(0)
    labels = predictions(expert, encoded)
    assert len(set(labels)) == 3
    expert.save_pretrained(tmp_path / "nameless")
    expert.config.id2label = dict(enumerate(NAMES))
    expert.config.label2id = {name: index for index, name in enumerate(NAMES)}
    expert.save_pretrained(tmp_path / "expert")
    rows = [{"text": t, "label": int(c)} for t, c in zip(texts, labels, strict=True)]
    test = write_json_lines(tmp_path / "indices.jsonl", rows)
    task |= {"expert": str(tmp_path / "expert"), "test": {"path": str(test), "label": "label"}}
    return text_recipe | {"tasks": {"topic": task}}


def accuracy(fields: dict[str, Any], root: Path) -> float:
    workspace = open_workspace(parse_recipe(fields), root)
    task, examples = next(iter(workspace.data.test.items()))
    return workspace.evaluator.score(workspace.expert(task, workspace.base()), task, examples)


def rows_of(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    lines = Path(recipe["tasks"]["topic"]["test"]["path"]).read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("kind", ["names", "indices"])
def test_texts(recipe, tmp_path, caplog, kind):
    rows = rows_of(recipe)
    by_name = [{"text": row["text"], "label": NAMES[row["label"]].upper()} for row in rows]
    test = {"path": str(tmp_path / "test.jsonl"), "label": "label"}
    recipe["tasks"]["topic"]["test"] = test
    if kind == "names":
        write_json_lines(tmp_path / "test.jsonl", by_name)
    else:
        table = datasets.Dataset.from_list(by_name).class_encode_column("label")
        assert table.features["label"].names == ["ART", "POLITICS", "SPORT"]
        table.to_parquet(tmp_path / "test.parquet")
        test["path"] = str(tmp_path / "test.parquet")
    assert accuracy(recipe, tmp_path) == 1
    assert "labels are matched by name" in caplog.text
    assert "(ART, POLITICS, SPORT)" in caplog.text and "(sport, politics, art)" in caplog.text


def test_the_recipe_names_the_outputs(recipe, tmp_path):
    rows = [{"text": row["text"], "label": NAMES[row["label"]]} for row in rows_of(recipe)]
    path = write_json_lines(tmp_path / "test.jsonl", rows)
    task = recipe["tasks"]["topic"]
    task["test"] = {"path": str(path), "label": "label"}
    task["expert"] = str(tmp_path / "nameless")  # LABEL_0, LABEL_1, LABEL_2
    with pytest.raises(InputError, match=r"class 'art', which is none of the config.json .*LABEL"):
        accuracy(recipe, tmp_path)
    task["class_names"] = NAMES[:2]
    with pytest.raises(InputError, match=r"class_names: has 2 names, the expert has 3 outputs"):
        accuracy(recipe, tmp_path)
    task["class_names"] = NAMES
    assert accuracy(recipe, tmp_path) == 1


def test_folders_of_grey_images_for_a_model_of_one_channel(tmp_path):
    config = dict(VIT, num_channels=1, num_labels=3, id2label=dict(enumerate(NAMES)))
    base = randomise(ViTModel(ViTConfig(**config), add_pooling_layer=False))
    base.save_pretrained(tmp_path / "base")
    expert = fine_tune(ViTForImageClassification(ViTConfig(**config)), base, 1)
    expert.save_pretrained(tmp_path / "expert")
    processor = ViTImageProcessorPil(
        size=dict(height=8, width=8), image_mean=[0.5], image_std=[0.5]
    )
    processor.save_pretrained(tmp_path / "base")
    greys = np.random.default_rng(0).integers(0, 256, (24, 8, 8))
    pixels = torch.from_numpy((greys[:, None] / 127.5 - 1).astype(np.float32))
    classes = predictions(expert, {"pixel_values": pixels})
    assert len(set(classes)) > 1
    for number, (grey, index) in enumerate(zip(greys, classes, strict=True)):
        save_image(tmp_path / "images" / NAMES[index] / f"val_{number}.png", grey)
    task = {
        "expert": "expert",
        "calibration": "images",
        "test": {"path": "images", "label": "label"},
    }
    assert accuracy({"base": str(tmp_path / "base"), "tasks": {"x": task}}, tmp_path) == 1
