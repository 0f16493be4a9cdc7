"""Experts of words, texts, numbers and labels side by side: from a recipe to checkpoints."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file
from scipy.stats import pearsonr, spearmanr
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

from adamerge_jax.cli import main as cli
from adamerge_jax.errors import InputError
from adamerge_jax.objectives import Targets, TaskOutputs, make_objective
from adamerge_jax.pipeline.account import account
from adamerge_jax.pipeline.ended_run import Run
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.pipeline.run_evaluate import evaluate
from adamerge_jax.pipeline.run_fold import fold_file
from adamerge_jax.pipeline.run_learn import learn
from adamerge_jax.pipeline.workspace import Workspace, open_workspace
from adamerge_jax.recipes.build import build
from adamerge_jax.recipes.loading import load_recipe, parse_recipe
from tests.references import (
    bert_tokenizer,
    fine_tune,
    randomise,
    save_suite,
    sentences,
    write_json_lines,
)

TAGS = ["O", "B-person", "I-person", "B-place", "I-place"]
EXPERTS = {
    "entities": dict(id2label=dict(enumerate(TAGS))),
    "topic": dict(num_labels=2),
    "rating": dict(num_labels=1),
    "moods": dict(
        id2label=dict(enumerate(["glad", "sad", "calm"])),
        problem_type="multi_label_classification",
    ),
}
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

    def rows(self, task: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.root / f"{task}.test.jsonl").open()]

    def outputs(self, model: PreTrainedModel, task: str) -> list[np.ndarray]:
        """A PyTorch model's outputs for each row; of words at their first tokens."""
        return [outputs_of(model, self.tokenizer, row) for row in self.rows(task)]


def outputs_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]
) -> np.ndarray:
    words = row.get("tokens")
    encoded = tokenizer(
        words or row["text"], is_split_into_words=words is not None, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**encoded).logits[0].numpy()
    if words is None:
        return logits
    places = encoded.word_ids(0)
    return logits[[places.index(position) for position in range(len(words))]]


def label_of(task: str, outputs: np.ndarray) -> Any:
    """The label that an expert's own outputs are."""
    if task == "entities":
        return outputs.argmax(-1).tolist()
    if task == "topic":
        return int(outputs.argmax())
    if task == "rating":
        return float(outputs[0])
    return [EXPERTS[task]["id2label"][label] for label in np.flatnonzero(outputs > 0).tolist()]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """Four experts of one BERT; labels are the experts' own."""
    root = tmp_path_factory.mktemp("problems")
    tokenizer = bert_tokenizer(root)
    base = randomise(BertModel(BertConfig(vocab_size=len(tokenizer), **SIZES)))
    experts, tasks = {}, {}
    for seed, (task, fields) in enumerate(EXPERTS.items(), start=1):
        config = BertConfig(vocab_size=len(tokenizer), **SIZES, **fields)
        head = BertForTokenClassification if task == "entities" else BertForSequenceClassification
        experts[task] = expert = fine_tune(head(config), base, seed)
        rows = []
        for text in sentences(12, seed):
            # A word of two letters is two tokens.
            words = [word if n % 3 else word + word for n, word in enumerate(text.split())]
            row = {"tokens": words} if task == "entities" else {"text": text}
            rows.append(row | {"label": label_of(task, outputs_of(expert, tokenizer, row))})
        plain = [{key: row[key] for key in row if key != "label"} for row in rows]
        calibration = write_json_lines(root / f"{task}.jsonl", plain)
        test = write_json_lines(root / f"{task}.test.jsonl", rows)
        tasks[task] = {
            "expert": task,
            "calibration": calibration.name,
            "test": {"path": test.name, "label": "label"},
        }
    fields = save_suite(root, base, experts, tokenizer, tasks, copies=1)
    return Suite(root, fields, tokenizer, experts)


@pytest.fixture(scope="module")
def merged(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("merged") / "run"
    return learn(parse_recipe(suite.fields), root=suite.root, out=out, console=QUIET)


@pytest.fixture(scope="module")
def workspace(suite: Suite) -> Workspace:
    return open_workspace(parse_recipe(suite.fields), suite.root)


def test_experts_give_the_outputs_and_losses_of_their_twins(
    suite: Suite, workspace: Workspace
) -> None:
    base = workspace.base()
    assert "bert.pooler.dense.weight" not in base  # texts have it in their heads, words have none
    for task, model in suite.experts.items():
        examples, rows = workspace.data.test[task], suite.rows(task)
        theirs = suite.outputs(model, task)
        loss = make_objective(workspace.models.problems[task].loss, {})
        parameters = workspace.expert(task, base)
        for index, outputs in workspace.evaluator.batches(parameters, task, examples):
            length = outputs.shape[1]
            counted = examples.take_counted(index, length)
            labels = examples.take_labels(index, length)
            losses = loss.value(TaskOutputs(outputs), Targets(labels=labels, counted=counted))
            for row, example in enumerate(index):
                ours = outputs[row] if counted is None else outputs[row, counted[row]]
                if task == "moods":
                    np.testing.assert_array_equal(ours[:, 0], 0)
                    ours = ours[:, 1]
                # Two implementations in float32.
                np.testing.assert_allclose(ours, theirs[example], atol=1e-4)
                expected = loss_of_transformers(suite, task, rows[example])
                np.testing.assert_allclose(losses[row], expected, atol=1e-4)


def loss_of_transformers(suite: Suite, task: str, row: dict[str, Any]) -> float:
    words = row.get("tokens")
    encoded = suite.tokenizer(
        words or row["text"], is_split_into_words=words is not None, return_tensors="pt"
    )
    if task == "entities":
        places = encoded.word_ids(0)
        labels = [
            -100 if word is None or word in places[:position] else row["label"][word]
            for position, word in enumerate(places)
        ]
        labels = torch.tensor([labels])
    elif task == "moods":
        names = EXPERTS[task]["id2label"].values()
        labels = torch.tensor([[float(name in row["label"]) for name in names]])
    else:
        labels = torch.tensor([row["label"]])
    with torch.no_grad():
        return float(suite.experts[task](**encoded, labels=labels).loss)


def test_what_has_no_meaning_is_refused_before_data_are_read(
    suite: Suite, workspace: Workspace, tmp_path: Path
) -> None:
    for fields, message in [
        ({"objectives": [{"name": "pseudo_labels"}]}, "objectives.0: pseudo_labels .*'entities'"),
        ({"preset": "symerge"}, "preset symerge: expert_labels has no meaning .* each word; take"),
        ({"preset": "adamerging"}, "preset adamerging: entropy has no meaning .*'rating'.*numbers"),
        ({"objectives": [{"name": "squared_error"}]}, "squared_error .*'entities', whose"),
        (
            {"objectives": [{"name": "logit_alignment", "options": {"cross_task": 0.5}}]},
            "objectives.0.options.cross_task: compares classes of examples, and .*'entities'",
        ),
        (
            {"objectives": [{"name": "squared_error", "weight": {"rating": 1}}]},
            "tasks.rating.calibration.label: is missing.* the column of the number",
        ),
        (
            {"evaluation": {"methods": [{"name": "fisher"}]}},
            "evaluation.methods.0: fisher weighs experts by how sure .*'rating'",
        ),
        ({"objectives": [{"name": "squared_error", "weight": {"topic": 1}}]}, "'topic', whose"),
    ]:
        recipe = parse_recipe(suite.fields | fields)
        with pytest.raises(InputError, match=message):
            build(recipe, workspace.models)
    (suite.root / "damaged.jsonl").write_text("no JSON")
    tasks = suite.fields["tasks"] | {
        "topic": suite.fields["tasks"]["topic"] | {"calibration": "damaged.jsonl"}
    }
    recipe = parse_recipe(suite.fields | {"preset": "symerge", "tasks": tasks})
    with pytest.raises(InputError, match="expert_labels has no meaning"):
        learn(recipe, root=suite.root, out=tmp_path / "run", console=QUIET)
    by_task = [{"name": "pseudo_labels", "weight": {"topic": 1.0}}]
    method = build(parse_recipe(suite.fields | {"objectives": by_task}), workspace.models)
    assert [spec.augmented for spec in method.target_specs.values()] == [False, True, False, False]


def test_an_expert_of_words_with_one_class_is_refused(suite: Suite, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    shutil.copytree(suite.root / "entities", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "O"}, "label2id": {"O": 0}}
    (folder / "config.json").write_text(json.dumps(config))
    task = suite.fields["tasks"]["entities"] | {"expert": str(folder)}
    recipe = parse_recipe(suite.fields | {"tasks": {"entities": task}})
    with pytest.raises(InputError, match=r"'entities' .* has num_labels 1 and gives a class for"):
        open_models(recipe, suite.root)


def test_account_says_that_the_pooler_is_a_part_of_heads(workspace: Workspace) -> None:
    lines = account(workspace.models, workspace.models.base.names)
    assert any("each task has its own: 2 (pooler.dense.bias, pooler" in line for line in lines)


def test_table(merged: Run, suite: Suite) -> None:
    assert {row.metric for row in merged.rows} == {"of_each_task"}
    experts = next(row for row in merged.rows if row.kind == "experts")
    assert experts.tasks == pytest.approx(dict.fromkeys(EXPERTS, 1.0))
    tables = {other.metric: set(other.tasks) for other in merged.rows[-1].further}
    assert tables == {
        "accuracy": {"topic"},
        "word_accuracy": {"entities"},
        "entity_f1": {"entities"},
        "micro_f1": {"moods"},
        "macro_f1": {"moods"},
        "pearson": {"rating"},
        "spearman": {"rating"},
        "r2": {"rating"},
    }


def test_exported_models_open_in_transformers_and_have_the_scores_of_the_table(
    suite: Suite, merged: Run
) -> None:
    table = {other.metric: other.tasks for other in merged.rows[-1].further}
    card = (merged.folder / "checkpoint" / "README.md").read_text()
    assert "AutoModelForTokenClassification.from_pretrained(" in card
    assert "`AutoModelForSequenceClassification` loads `tasks/topic`, `tasks/rating`" in card
    for task in EXPERTS:
        is_words = task == "entities"
        auto = AutoModelForTokenClassification if is_words else AutoModelForSequenceClassification
        folder = merged.folder / "checkpoint" / "tasks" / task
        model, loaded = auto.from_pretrained(folder, output_loading_info=True)
        assert not loaded["missing_keys"]
        outputs = suite.outputs(model, task)
        labels = [row["label"] for row in suite.rows(task)]
        given = [label_of(task, row) for row in outputs]
        if task == "rating":
            assert table["pearson"][task] == pytest.approx(pearsonr(given, labels)[0], abs=1e-4)
            assert table["spearman"][task] == pytest.approx(spearmanr(given, labels)[0], abs=1e-4)
            errors, deviations = np.subtract(given, labels), np.subtract(labels, np.mean(labels))
            expected = 1 - np.square(errors).sum() / np.square(deviations).sum()
            assert table["r2"][task] == pytest.approx(expected, abs=1e-3)
        elif task == "moods":
            names = EXPERTS[task]["id2label"].values()
            ours, theirs = (
                np.array([[name in row for name in names] for row in side])
                for side in (given, labels)
            )
            hits, sizes = (ours & theirs).sum(0), ours.sum(0) + theirs.sum(0)
            assert table["micro_f1"][task] == pytest.approx(2 * hits.sum() / sizes.sum())
            occurs = theirs.any(0)
            macro = (2 * hits[occurs] / sizes[occurs]).mean()
            assert table["macro_f1"][task] == pytest.approx(macro)
        else:
            ours, theirs = (np.hstack(side) for side in (given, labels))
            metric = "word_accuracy" if is_words else "accuracy"
            assert table[metric][task] == pytest.approx((ours == theirs).mean())


def test_fold_and_evaluate_repeat_the_merge(suite: Suite, merged: Run, tmp_path: Path) -> None:
    recipe, out = parse_recipe(suite.fields), tmp_path / "folded"
    file = merged.folder / "coefficients.safetensors"
    fold_file(file, recipe, root=suite.root, out=out, console=QUIET)
    for task in suite.experts:
        learned, folded = {}, {}
        for tensors, run in [(learned, merged.folder), (folded, out)]:
            for shard in sorted((run / "checkpoint" / "tasks" / task).glob("*.safetensors")):
                tensors |= load_file(shard)
        assert learned.keys() == folded.keys()
        for name, array in learned.items():
            np.testing.assert_array_equal(folded[name], array, err_msg=name)
    row = evaluate(recipe, str(out / "checkpoint"), root=suite.root, console=QUIET)
    assert row.tasks == pytest.approx(merged.rows[-1].tasks, abs=1e-3)


def test_a_first_recipe_finds_the_data_of_each_kind(suite: Suite, tmp_path: Path):
    out = tmp_path / "recipe.yaml"
    models = [str(suite.root / name) for name in ("base", *EXPERTS)]
    cli.main(["new", *models, "--out", str(out)])
    for task, fields in load_recipe(out).tasks.items():
        given = suite.fields["tasks"][task]
        assert fields.calibration.path == str(suite.root / given["calibration"])
        assert fields.test.path == str(suite.root / given["test"]["path"])
        assert fields.test.label == "label"
    assert "classifier of words (bert) and classifier of texts (bert) and" in out.read_text()


@pytest.mark.parametrize(
    ("task", "label", "message"),
    [
        ("entities", lambda row: [-100] * len(row["tokens"]), "no word has a class"),
        ("moods", lambda row: [], "no example has a label"),
        ("rating", lambda row: 1, "all numbers are the same"),
    ],
)
def test_labels_that_nothing_can_be_scored_by(
    task: str, label: Callable[[dict[str, Any]], Any], message: str, suite: Suite, tmp_path: Path
) -> None:
    rows = [row | {"label": label(row)} for row in suite.rows(task)]
    test = {"path": str(write_json_lines(tmp_path / "test.jsonl", rows)), "label": "label"}
    fields = suite.fields | {"tasks": {task: suite.fields["tasks"][task] | {"test": test}}}
    with pytest.raises(InputError, match=rf"tasks\.{task}\.test\.label: {message}"):
        open_workspace(parse_recipe(fields), suite.root)
