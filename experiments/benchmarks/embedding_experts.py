"""Sentence embedders merged: `python experiments/benchmarks/embedding_experts.py BASE DATA OUT`.

BASE is the folder of all-MiniLM-L6-v2, DATA that of text6's sentences. Two experts are fine-tuned
from it with a contrastive loss, each on a notion of similarity of its own: one has questions of the
same type near each other (trec), the other sentences that are both subjective or both objective
(subj). They are merged by averaging, by RegMean, by task arithmetic with the coefficient that is
best on validation pairs, and with `recommended`. The table is Spearman's correlation of the cosines
of test pairs with their scores, 1 for two sentences of a class and 0 for others.

Sentences to train from, to choose with, to learn coefficients from and to test with are apart:
those of `fewshot` and half of `test` train experts, a tenth makes validation pairs, the rest test
pairs; coefficients are learned from `calibration`, which has no labels.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from sentence_transformers import SentenceTransformer

from adamerge_jax import load_recipe
from adamerge_jax.pipeline.run_learn import learn

TASKS = {"questions": "trec", "subjectivity": "subj"}
"""The set of text6 whose classes make each expert's notion of similarity."""

RECIPE = Path(__file__).parents[1] / "recipes" / "embedding_experts.yaml"

STEPS, BATCH, LEARNING_RATE, TEMPERATURE = 80, 32, 5e-5, 0.1
PAIRS = {"validation": 400, "test": 2000}


class Sentence(NamedTuple):
    """A sentence with its class."""

    text: str
    label: int


def read(file: Path) -> list[Sentence]:
    """Reads labelled sentences."""
    rows = [json.loads(line) for line in file.open(encoding="utf-8")]
    return [Sentence(row["text"], row["label"]) for row in rows]


def split(data: Path, name: str) -> dict[str, list[Sentence]]:
    """Returns the labelled sentences of each part."""
    labelled = read(data / f"{name}.test.jsonl")
    np.random.default_rng(0).shuffle(labelled)
    half, validation = len(labelled) // 2, len(labelled) // 10
    return {
        "train": read(data / f"{name}.fewshot.jsonl") + labelled[:half],
        "validation": labelled[half : half + validation],
        "test": labelled[half + validation :],
    }


def write_pairs(sentences: list[Sentence], count: int, file: Path, seed: int) -> None:
    """Writes pairs of sentences, half of them of one class."""
    generator = np.random.default_rng(seed)
    rows: dict[int, list[dict[str, object]]] = {0: [], 1: []}
    while min(map(len, rows.values())) < count // 2:
        first, second = (sentences[i] for i in generator.choice(len(sentences), 2, replace=False))
        score = int(first.label == second.label)
        rows[score].append({"first": first.text, "second": second.text, "score": score})
    chosen = rows[0][: count // 2] + rows[1][: count // 2]
    file.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")


def contrastive_loss(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Supervised contrastive loss (Khosla et al., NeurIPS 2020, eq. 2)."""
    unit = torch.nn.functional.normalize(embeddings, dim=-1)
    itself = torch.eye(len(labels), dtype=torch.bool)
    similarities = (unit @ unit.T / TEMPERATURE).masked_fill(itself, -torch.inf)
    log_shares = torch.log_softmax(similarities, dim=-1)
    alike = (labels[:, None] == labels) & ~itself
    counted = alike.any(-1)
    means = log_shares.masked_fill(~alike, 0).sum(-1)[counted] / alike.sum(-1)[counted]
    return -means.mean()


def train(base: str, sentences: list[Sentence], out: Path, seed: int) -> None:
    """Fine-tunes an expert and saves it."""
    torch.manual_seed(seed)
    model = SentenceTransformer(base, device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    order = torch.cat([torch.randperm(len(sentences)) for _ in range(STEPS)])
    model.train()
    for step in range(STEPS):
        chosen = [sentences[i] for i in order[step * BATCH : (step + 1) * BATCH]]
        features = model.preprocess([sentence.text for sentence in chosen])
        embeddings = model(features)["sentence_embedding"]
        loss = contrastive_loss(embeddings, torch.tensor([s.label for s in chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.save(str(out))


def main() -> None:
    """Trains experts, merges them and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("base", "data", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out, base = arguments.out, str(arguments.base.resolve())
    out.mkdir(parents=True)
    started = time.process_time()
    for task, name in TASKS.items():
        parts = split(arguments.data, name)
        for part, count in PAIRS.items():
            write_pairs(parts[part], count, out / f"{task}.{part}.jsonl", arguments.seed)
        shutil.copy(arguments.data / f"{name}.calibration.jsonl", out / f"{task}.calibration.jsonl")
        train(base, parts["train"], out / "experts" / task, arguments.seed)
    print(f"experts: {time.process_time() - started:.0f} s of processor time")
    started = time.process_time()
    (out / "base").symlink_to(base, target_is_directory=True)
    recipe = load_recipe(RECIPE)
    run = learn(recipe, root=out, out=out / "run", console=Console())
    print(f"merge and table: {time.process_time() - started:.0f} s of processor time")
    merged = SentenceTransformer(str(run.folder / "checkpoint"), device="cpu")
    print(f"opened by sentence-transformers: {merged}")


if __name__ == "__main__":
    main()
