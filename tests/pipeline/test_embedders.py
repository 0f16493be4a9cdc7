"""Sentence embedders from a recipe to a checkpoint that sentence-transformers opens."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel, BertTokenizer

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.sentence_modules import read_embedding_form, write_embedding_form
from adamerge_jax.models.embedding_form import EmbeddingForm
from adamerge_jax.pipeline.models import match_backbone
from adamerge_jax.pipeline.read import load_backbone
from adamerge_jax.pipeline.run import Run, evaluate, learn
from adamerge_jax.pipeline.workspace import Workspace, open_workspace
from adamerge_jax.recipes.loading import parse_recipe

TASKS = ("colours", "animals")
WORDS = [f"w{number}" for number in range(40)]
FEATURES = 16
FORM = EmbeddingForm("mean", True, prompts={"query": "w1 "})


class Embedders(NamedTuple):
    root: Path
    fields: dict[str, Any]


@pytest.fixture(scope="module")
def embedders(tmp_path_factory: pytest.TempPathFactory) -> Embedders:
    """A base and two experts, as sentence-transformers saves them, and pairs with scores."""
    root = tmp_path_factory.mktemp("embedders")
    vocabulary = root / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizer(str(vocabulary))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=45,
        hidden_size=FEATURES,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=24,
    )
    base = BertModel(config).state_dict()
    for name in ("base", *TASKS):
        model = BertModel(config)
        model.load_state_dict(base)
        if name != "base":
            with torch.no_grad():
                for tensor in model.parameters():
                    tensor += 0.1 * torch.randn_like(tensor)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        write_embedding_form(root / name, FORM, FEATURES)
    tasks = {}
    for number, task in enumerate(TASKS):
        _write_pairs(root / f"{task}.jsonl", 24, seed=number)
        pairs = {"path": f"{task}.jsonl", "text": ["first", "second"]}
        tasks[task] = {
            "expert": task,
            "calibration": {"path": f"{task}.jsonl", "text": "first"},
            "test": pairs | {"label": "score"},
        }
    learning = {"steps": 2, "batch_size": 8, "copies": 1}
    return Embedders(root, {"base": "base", "tasks": tasks, "learning": learning})


def _write_pairs(file: Path, count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(generator.choice(WORDS, generator.integers(2, 14)))

    rows = [
        {"first": text(), "second": text(), "score": int(generator.integers(4))}
        for _ in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _run(embedders: Embedders, out: Path, **fields: Any) -> Run:
    recipe = parse_recipe(embedders.fields | fields)
    return learn(recipe, root=embedders.root, out=out, console=Console(quiet=True))


@pytest.fixture(scope="module")
def merged(embedders: Embedders, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return _run(embedders, tmp_path_factory.mktemp("merged") / "run")


@pytest.fixture(scope="module")
def workspace(embedders: Embedders) -> Workspace:
    return open_workspace(parse_recipe(embedders.fields), embedders.root)


def _pairs(embedders: Embedders, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (embedders.root / f"{task}.jsonl").open()]


def test_export_opens_in_sentence_transformers(
    embedders: Embedders, merged: Run, workspace: Workspace
) -> None:
    folder = merged.folder / "checkpoint"
    reference = SentenceTransformer(str(folder), device="cpu")
    matched = match_backbone(workspace.models, Checkpoint.open(folder), "merge")
    parameters = load_backbone(workspace.models, matched, None)
    for task in TASKS:
        pairs = _pairs(embedders, task)
        ours = workspace.evaluator.logits(parameters, task, workspace.data.test[task])
        assert ours.shape == (len(pairs), 2, FEATURES)
        sides = [reference.encode([pair[side] for pair in pairs]) for side in ("first", "second")]
        for position, theirs in enumerate(sides):
            # Two implementations in float32 of vectors of length 1.
            np.testing.assert_allclose(ours[:, position], theirs, atol=1e-5)
        similarities = (sides[0] * sides[1]).sum(-1)
        expected = spearmanr(similarities, [pair["score"] for pair in pairs])[0]
        assert merged.rows[-1].tasks[task] == pytest.approx(expected, abs=1e-3)
    assert read_embedding_form(folder, FEATURES) == FORM
    names = Checkpoint.open(folder).tensors
    assert "encoder.layer.1.output.dense.weight" in names  # no prefix that a head would need
    assert "pooler.dense.weight" in names  # carried: no embedding depends on it


def test_table_and_evaluation(embedders: Embedders, merged: Run, workspace: Workspace) -> None:
    assert {row.metric for row in merged.rows} == {"spearman"}
    row = evaluate(
        parse_recipe(embedders.fields),
        str(merged.folder / "checkpoint"),
        root=embedders.root,
        console=Console(quiet=True),
    )
    assert row.tasks == pytest.approx(merged.rows[-1].tasks, abs=1e-3)
    card = (merged.folder / "checkpoint" / "README.md").read_text()
    assert "sentence-transformers" in card and "SentenceTransformer(" in card
