"""Experts that classify words, beside one that classifies texts: from a recipe to checkpoints."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from adamerge_jax.errors import InputError
from adamerge_jax.pipeline.run import Run, evaluate, fold_file, learn
from adamerge_jax.pipeline.workspace import Workspace, open_workspace
from adamerge_jax.recipes.build import build
from adamerge_jax.recipes.loading import parse_recipe
from tests.references import bert_tokenizer, fine_tune, randomise, sentences, write_json_lines

TAGS = ["O", "B-person", "I-person", "B-place", "I-place"]
KINDS = ["noun", "verb", "other"]
SIZES = dict(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=32,
)
QUIET = Console(quiet=True)


class Suite(NamedTuple):
    root: Path
    fields: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    experts: dict[str, PreTrainedModel]


def word_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, words: list[str]
) -> np.ndarray:
    """The logits of a PyTorch model for each word, at its first token."""
    encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
    places = encoded.word_ids(0)
    first = [places.index(position) for position in range(len(words))]
    with torch.no_grad():
        return model(**encoded).logits[0, first].numpy()


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """Entities, parts of speech and a topic, three experts of one BERT; labels are the experts'."""
    root = tmp_path_factory.mktemp("words")
    tokenizer = bert_tokenizer(root)
    base = randomise(BertModel(BertConfig(vocab_size=len(tokenizer), **SIZES)))
    classes = {"entities": TAGS, "speech": KINDS, "topic": ["a", "b"]}
    experts, tasks = {}, {}
    for seed, (task, names) in enumerate(classes.items(), start=1):
        config = BertConfig(vocab_size=len(tokenizer), id2label=dict(enumerate(names)), **SIZES)
        of_words = task != "topic"
        head = BertForTokenClassification if of_words else BertForSequenceClassification
        experts[task] = expert = fine_tune(head(config), base, seed)
        rows = []
        for text in sentences(12, seed):
            # A word of two letters is two tokens.
            words = [word if n % 3 else word + word for n, word in enumerate(text.split())]
            if of_words:
                tags = word_logits(expert, tokenizer, words).argmax(-1)
                tags = [names[tag] for tag in tags] if task == "speech" else tags.tolist()
                rows.append({"tokens": words, "ner_tags": tags})
            else:
                with torch.no_grad():
                    logits = expert(**tokenizer(text, return_tensors="pt")).logits
                rows.append({"text": text, "ner_tags": int(logits.argmax())})
        plain = [{key: row[key] for key in row if key != "ner_tags"} for row in rows]
        calibration = write_json_lines(root / f"{task}.jsonl", plain)
        test = write_json_lines(root / f"{task}.test.jsonl", rows)
        tasks[task] = {
            "expert": task,
            "calibration": calibration.name,
            "test": {"path": test.name, "label": "ner_tags"},
        }
    for name, model in {"base": base, **experts}.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    learning = {"steps": 2, "batch_size": 4, "copies": 1}
    fields = {"base": "base", "tasks": tasks, "learning": learning, "export": {"orbax": False}}
    return Suite(root, fields, tokenizer, experts)


@pytest.fixture(scope="module")
def merged(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("merged") / "run"
    return learn(parse_recipe(suite.fields), root=suite.root, out=out, console=QUIET)


@pytest.fixture(scope="module")
def workspace(suite: Suite) -> Workspace:
    return open_workspace(parse_recipe(suite.fields), suite.root)


def test_experts_give_the_logits_of_their_twins(suite: Suite, workspace: Workspace) -> None:
    base = workspace.base()
    assert "bert.pooler.dense.weight" not in base  # the text's head has it, words have none
    for task in ("entities", "speech"):
        examples = workspace.data.calibration[task]
        rows = [json.loads(line) for line in (suite.root / f"{task}.jsonl").open()]
        parameters = workspace.expert(task, base)
        for index, logits in workspace.evaluator.batches(parameters, task, examples):
            counted = examples.take_counted(index, logits.shape[1])
            for row, example in enumerate(index):
                theirs = word_logits(suite.experts[task], suite.tokenizer, rows[example]["tokens"])
                # Two implementations in float32.
                np.testing.assert_allclose(logits[row, counted[row]], theirs, atol=1e-4)


def test_what_has_no_meaning_for_words_is_refused(suite: Suite, workspace: Workspace) -> None:
    objective = {"name": "pseudo_labels"}
    for fields, message in [
        ({"objectives": [objective]}, "objectives.0: pseudo_labels has no meaning for .*entities"),
        ({"preset": "symerge"}, "preset symerge: expert_labels has no meaning .* each word; take"),
        (
            {"objectives": [{"name": "logit_alignment", "options": {"cross_task": 0.5}}]},
            "objectives.0.options.cross_task: compares classes of examples, and .*'entities'",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            build(parse_recipe(suite.fields | fields), workspace.models)
    by_task = [objective | {"weight": {"topic": 1.0}}, {"name": "entropy"}]
    method = build(parse_recipe(suite.fields | {"objectives": by_task}), workspace.models)
    assert [spec.augmented for spec in method.target_specs.values()] == [False, False, True]


def test_table(merged: Run, suite: Suite) -> None:
    assert {row.metric for row in merged.rows} == {"of_each_task"}
    experts = next(row for row in merged.rows if row.kind == "experts")
    assert experts.tasks == pytest.approx(dict.fromkeys(suite.experts, 1.0))
    tables = {other.metric: set(other.tasks) for other in merged.rows[-1].further}
    assert tables == {
        "accuracy": {"topic"},
        "word_accuracy": {"entities", "speech"},
        "entity_f1": {"entities"},
    }


def test_exported_models_open_in_transformers(suite: Suite, merged: Run) -> None:
    folder = merged.folder / "checkpoint"
    for task, model_class in [
        ("entities", AutoModelForTokenClassification),
        ("speech", AutoModelForTokenClassification),
        ("topic", AutoModelForSequenceClassification),
    ]:
        model, loaded = model_class.from_pretrained(
            folder / "tasks" / task, output_loading_info=True
        )
        assert not loaded["missing_keys"]
        right, total = 0, 0
        for line in (suite.root / f"{task}.test.jsonl").open():
            row = json.loads(line)
            if task == "topic":
                with torch.no_grad():
                    logits = model(**suite.tokenizer(row["text"], return_tensors="pt")).logits
                given, wanted = [int(logits.argmax())], [row["ner_tags"]]
            else:
                given = word_logits(model, suite.tokenizer, row["tokens"]).argmax(-1).tolist()
                wanted = row["ner_tags"]
                if task == "speech":
                    given = [KINDS[tag] for tag in given]
            right += sum(a == b for a, b in zip(given, wanted, strict=True))
            total += len(given)
        metric = "accuracy" if task == "topic" else "word_accuracy"
        table = next(row for row in merged.rows[-1].further if row.metric == metric)
        assert table.tasks[task] == pytest.approx(right / total)


def test_fold_and_evaluate_repeat_the_merge(suite: Suite, merged: Run, tmp_path: Path) -> None:
    recipe, out = parse_recipe(suite.fields), tmp_path / "folded"
    file = merged.folder / "coefficients.safetensors"
    fold_file(file, recipe, root=suite.root, out=out, console=QUIET)
    for task in suite.experts:
        folder = Path("checkpoint/tasks") / task
        learned, folded = ({}, {})
        for tensors, run in [(learned, merged.folder), (folded, out)]:
            for file in sorted((run / folder).glob("*.safetensors")):
                tensors |= load_file(file)
        assert learned.keys() == folded.keys()
        for name, array in learned.items():
            np.testing.assert_array_equal(folded[name], array, err_msg=name)
    row = evaluate(recipe, str(out / "checkpoint"), root=suite.root, console=QUIET)
    assert row.tasks == pytest.approx(merged.rows[-1].tasks, abs=1e-3)
