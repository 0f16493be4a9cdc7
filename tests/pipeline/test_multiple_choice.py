"""Experts of multiple choice: from a recipe to checkpoints that `transformers` opens."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file
from transformers import (
    AutoModelForMultipleChoice,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForMultipleChoice,
    RobertaModel,
)

from adamerge_jax.errors import InputError
from adamerge_jax.pipeline.ended_run import Run
from adamerge_jax.pipeline.run_evaluate import evaluate
from adamerge_jax.pipeline.run_fold import fold_file
from adamerge_jax.pipeline.run_learn import learn
from adamerge_jax.pipeline.workspace import open_workspace
from adamerge_jax.plan.outline import outline
from adamerge_jax.recipes.loading import parse_recipe
from tests.references import (
    bert_tokenizer,
    fine_tune,
    randomise,
    save_suite,
    sentences,
    write_json_lines,
)

CHOICES = 3
QUIET = Console(quiet=True)


class Suite(NamedTuple):
    root: Path
    fields: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    experts: dict[str, PreTrainedModel]


def logits_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, choices: list[str]
) -> np.ndarray:
    encoded = tokenizer([text] * len(choices), choices, padding=True, return_tensors="pt")
    inputs = {name: array[None] for name, array in encoded.items()}
    with torch.no_grad():
        return model(**inputs).logits[0].numpy()


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """One task with a list of choices, another with a column for each; labels are the experts'."""
    root = tmp_path_factory.mktemp("choices")
    tokenizer = bert_tokenizer(root)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        type_vocab_size=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    base = randomise(RobertaModel(config, add_pooling_layer=False))
    experts, tasks = {}, {}
    for seed, task in enumerate(("lists", "columns"), start=1):
        experts[task] = expert = fine_tune(RobertaForMultipleChoice(config), base, seed)
        texts = sentences(12, seed)
        choices = list(zip(*(sentences(12, 10 * seed + n) for n in range(CHOICES)), strict=True))
        rows = []
        for text, of_text in zip(texts, choices, strict=True):
            right = int(logits_of(expert, tokenizer, text, list(of_text)).argmax())
            if task == "lists":
                rows.append({"text": text, "endings": of_text, "label": "ABC"[right]})
            else:
                named = {f"choice{n}": choice for n, choice in enumerate(of_text)}
                rows.append({"text": text, **named, "label": str(right)})
        file = write_json_lines(root / f"{task}.jsonl", rows).name
        named = [f"choice{n}" for n in range(CHOICES)]
        data = {"path": file, "choices": "endings" if task == "lists" else named}
        test = data | {"label": "label"}
        tasks[task] = {"expert": task, "calibration": data, "test": test}
    fields = save_suite(root, base, experts, tokenizer, tasks, copies=0)
    return Suite(root, fields, tokenizer, experts)


@pytest.fixture(scope="module")
def merged(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("merged") / "run"
    unscored = {
        name: {key: task[key] for key in task if key != "test"}
        for name, task in suite.fields["tasks"].items()
    }
    recipe = parse_recipe(suite.fields | {"tasks": unscored})
    return learn(recipe, root=suite.root, out=out, console=QUIET)


def test_an_expert_is_right_on_its_own_labels_and_a_batch_has_all_choices(suite: Suite) -> None:
    recipe = parse_recipe(suite.fields)
    row = evaluate(recipe, str(suite.root / "lists"), root=suite.root, console=QUIET)
    assert (row.metric, row.tasks["lists"]) == ("accuracy", 1.0)
    batch = outline(recipe, suite.root).batch(16)
    assert batch.inputs["input_ids"].shape == (2 * 4, CHOICES, 16)


def test_exported_and_folded_models_choose_as_the_evaluation_says(
    suite: Suite, merged: Run, tmp_path: Path
) -> None:
    recipe, out = parse_recipe(suite.fields), tmp_path / "folded"
    file = merged.folder / "coefficients.safetensors"
    fold_file(file, recipe, root=suite.root, out=out, console=QUIET)
    table = evaluate(recipe, str(out / "checkpoint"), root=suite.root, console=QUIET)
    for task in suite.experts:
        model, loaded = AutoModelForMultipleChoice.from_pretrained(
            merged.folder / "checkpoint" / "tasks" / task, output_loading_info=True
        )
        assert not loaded["missing_keys"]
        tensors = {}
        for shard in sorted((out / "checkpoint" / "tasks" / task).glob("*.safetensors")):
            tensors |= load_file(shard)
        for name, tensor in model.state_dict().items():
            np.testing.assert_array_equal(tensors[name], tensor.numpy(), err_msg=name)
        right = []
        for line in (suite.root / f"{task}.jsonl").open():
            row = json.loads(line)
            choices = row.get("endings") or [row[f"choice{n}"] for n in range(CHOICES)]
            given = int(logits_of(model, suite.tokenizer, row["text"], choices).argmax())
            right.append(row["label"] in ("ABC"[given], str(given)))
        assert table.tasks[task] == pytest.approx(np.mean(right))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.update(endings=["a"]), "row 2: column 'endings' has 1 choices, expected"),
        (lambda row: row.update(endings="abc"), "row 2: column 'endings' holds 'abc', expected"),
        (lambda row: row.update(label="D"), "row 2: 'label' is 'D'; expected the number of"),
        (lambda row: row.update(label=3), "row 2: 'label' is 3; expected"),
        (lambda row: row.update(label=-1), "row 2: 'label' is -1; expected"),
    ],
)
def test_rows_without_choices(change, message, suite: Suite, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (suite.root / "lists.jsonl").open()]
    change(rows[2])
    file = write_json_lines(tmp_path / "data.jsonl", rows)
    task = suite.fields["tasks"]["lists"]
    for part in ("calibration", "test"):
        task = task | {part: task[part] | {"path": str(file), "label": "label"}}
    with pytest.raises(InputError, match=message):
        open_workspace(parse_recipe(suite.fields | {"tasks": {"lists": task}}), suite.root)


def test_choices_must_be_named(suite: Suite) -> None:
    task = suite.fields["tasks"]["lists"] | {"calibration": "lists.jsonl"}
    with pytest.raises(InputError, match="calibration data of task 'lists': choices is missing"):
        open_workspace(parse_recipe(suite.fields | {"tasks": {"lists": task}}), suite.root)


@pytest.mark.parametrize("columns", [[], ["choice0"]])
def test_one_choice_is_none(columns: list[str], suite: Suite) -> None:
    task = suite.fields["tasks"]["columns"]
    task = task | {"calibration": task["calibration"] | {"choices": columns}}
    with pytest.raises(InputError, match=f"choices has {len(columns)} columns, expected one for"):
        open_workspace(parse_recipe(suite.fields | {"tasks": {"columns": task}}), suite.root)
