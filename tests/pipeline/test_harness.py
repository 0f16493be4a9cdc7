"""Scores by lm-evaluation-harness, with tasks of the test's own: no hub is asked."""

import copy
import importlib.util
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from adamerge_jax.errors import InputError
from adamerge_jax.evaluation import harness as harness_module
from adamerge_jax.evaluation.harness import Harness, _write_chat
from adamerge_jax.pipeline.run_evaluate import evaluate
from adamerge_jax.pipeline.run_learn import learn
from adamerge_jax.pipeline.run_merge import merge
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.recipes.schema import LmEvalRecipe
from adamerge_jax.report.page import write_page
from adamerge_jax.runs.evaluations import read_evaluations
from adamerge_jax.runs.harness import HarnessRow
from adamerge_jax.runs.results import read_results
from adamerge_jax.search.run_search import search
from adamerge_jax.stopping import Stopped
from tests.language_references import ANIMALS, COLOURS, VERBS, byte_tokenizer, save_models

lm_eval = pytest.importorskip("lm_eval")

TOKENIZER = byte_tokenizer()
QUIET = Console(quiet=True)

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: right
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""

GROUP = """
group: sentences
task: [verbs, animals]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 2.0}
"""


def documents(seed: int, choices: list[str]) -> list[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    return [
        {
            "question": f"the {colour} {animal}",
            "choices": choices,
            "right": int(generator.integers(len(choices))),
        }
        for colour in COLOURS[:4]
        for animal in ANIMALS[:4]
    ]


DOCUMENTS = {
    "verbs": documents(0, [f" {verb} ." for verb in VERBS]),
    "animals": documents(1, [f" and the {animal}" for animal in ANIMALS]),
}


class Suite(NamedTuple):
    """Models, and a folder of tasks with their data."""

    root: Path
    fields: dict[str, Any]

    @property
    def tasks(self) -> Path:
        return self.root / "own"

    def recipe(self, **settings: Any) -> Any:
        """The recipe with these settings of lm_eval."""
        settings = {"include_path": "own", **settings}
        fields = copy.deepcopy(self.fields) | {"evaluation": {"lm_eval": settings}}
        return parse_recipe(fields, allow_code=True)

    def merge(self, out: Path, console: Console = QUIET, **settings: Any) -> Path:
        recipe = self.recipe(**settings)
        options = {"coefficient": 0.5}
        merge(recipe, "task_arithmetic", options, root=self.root, out=out, console=console)
        return out


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """A base, two whole experts and an adapter; one of the tasks has no data yet."""
    root = tmp_path_factory.mktemp("harness")
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    fields = save_models(root, LlamaForCausalLM(config), TOKENIZER)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(root / "base"),
        LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False),
    )
    adapted.save_pretrained(root / "adapter")
    fields["tasks"]["rhyming"]["expert"] = str(root / "adapter")
    (root / "own").mkdir()
    for name, rows in DOCUMENTS.items():
        file = root / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (root / "own" / f"{name}.yaml").write_text(TASK.format(name=name, file=file))
    (root / "own" / "sentences.yaml").write_text(GROUP)
    return Suite(root, fields)


@pytest.fixture(scope="module", autouse=True)
def few_tasks() -> Iterator[None]:
    """Looking up the harness's own 14,000 tasks takes seconds: here it has two folders of them."""
    few = [Path(lm_eval.__file__).parent / "tasks" / name for name in ("arc", "humaneval")]

    def make(folders: tuple[Path, ...]) -> Any:
        from lm_eval.tasks import TaskManager

        return TaskManager(include_defaults=False, include_path=[*few, *folders])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness_module, "_make_manager", make)
        yield


@pytest.fixture(scope="module")
def merged(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(suite.root / "cache"))
        return suite.merge(tmp_path_factory.mktemp("merged") / "run", tasks=["sentences", "verbs"])


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def log_likelihoods(model: Any, document: dict[str, Any]) -> list[float]:
    """The log-likelihood of each choice behind the question, one text at a time."""
    sums = []
    for choice in document["choices"]:
        asked = TOKENIZER(document["question"])["input_ids"]
        tokens = torch.tensor([TOKENIZER(document["question"] + choice)["input_ids"]])
        with torch.no_grad():
            scores = torch.log_softmax(model(tokens).logits[0].float(), -1)
        places = range(len(asked), tokens.shape[1])
        sums.append(sum(float(scores[place - 1, tokens[0, place]]) for place in places))
    return sums


def accuracies(model: Any, documents: list[dict[str, Any]]) -> tuple[float, float]:
    """The accuracy by log-likelihoods, and by these divided by the length of the choice."""
    right = []
    for document in documents:
        sums = np.array(log_likelihoods(model, document))
        lengths = np.array([len(choice) for choice in document["choices"]])
        right.append(
            [sums.argmax() == document["right"], (sums / lengths).argmax() == document["right"]]
        )
    return tuple(np.mean(right, axis=0))


def scores_of(row: HarnessRow) -> dict[str, dict[str, float]]:
    return {t.name: {s.metric: s.value for s in t.scores} for t in row.tasks}


def test_scores_are_those_of_transformers(suite: Suite, merged: Path):
    results = read_results(merged / "results.json").harness
    assert [row.model for row in results.rows] == ["base", "counting", "naming", "rhyming", "merge"]
    kinds = [row.kind for row in results.rows]
    assert kinds == ["base", "expert", "expert", "expert", "merge"]
    load = AutoModelForCausalLM.from_pretrained
    models = {name: load(suite.root / name) for name in ("base", "counting", "naming")}
    models["rhyming"] = PeftModel.from_pretrained(load(suite.root / "base"), suite.root / "adapter")
    models["merge"] = load(merged / "checkpoint")
    distinct = set()
    for row in results.rows:
        by_task = scores_of(row)
        # A group has its parts behind it; a task that was asked for twice is there once.
        assert [(t.name, t.shown) for t in row.tasks] == [
            ("sentences", True),
            ("verbs", True),
            ("animals", False),
        ]
        for task in DOCUMENTS:
            expected = accuracies(models[row.model].eval(), DOCUMENTS[task])
            assert (by_task[task]["acc"], by_task[task]["acc_norm"]) == pytest.approx(expected)
        parts = [by_task[task]["acc"] for task in DOCUMENTS]
        assert by_task["sentences"]["acc"] == pytest.approx(np.mean(parts))
        distinct.add(json.dumps(by_task))
    assert len(distinct) > 2  # the models are told apart


def test_they_are_shown_wherever_results_are(suite: Suite, merged: Path):
    card = (merged / "checkpoint" / "README.md").read_text()
    results = read_results(merged / "results.json")
    value = results.harness.rows[-1].tasks[0].scores[0]
    assert "## Scores by lm-eval" in card
    assert f"| {value.value:.4f} \u00b1 {value.stderr:.4f} |" in card
    assert not (merged / "state").exists()
    assert "animals" not in card  # a part of a group that has a score of its own


def test_what_is_known_is_not_evaluated_again(suite, tmp_path, monkeypatch):
    opened, open_model = [], Harness.open_model

    def counted(harness: Harness, model: Any, on_request: Any) -> Any:
        opened.append((model.adapter or model.folder).name)
        return open_model(harness, model, on_request)

    monkeypatch.setattr(Harness, "open_model", counted)
    settings = {"tasks": ["verbs"], "limit": 5, "num_fewshot": 2}
    out = suite.merge(tmp_path / "first", **settings)
    assert opened == ["base", "counting", "naming", "adapter", "checkpoint"]
    first = read_results(out / "results.json").harness
    task = first.rows[0].tasks[0]
    assert (task.examples, task.shots, first.limit) == (5, 2, 5)
    # Another merge, with another task: the base and the experts are known on the first one.
    opened.clear()
    again = read_results(suite.merge(tmp_path / "again", **settings) / "results.json").harness
    assert opened == ["checkpoint"]
    assert again == first
    opened.clear()
    printed = io.StringIO()
    recipe = suite.recipe(**settings)
    console = Console(file=printed, width=100)
    assert evaluate(recipe, str(out), root=suite.root, console=console) is None
    assert not opened
    assert "verbs, 2-shot" in printed.getvalue()
    # Other settings are evaluated.
    suite.merge(tmp_path / "other", tasks=["verbs"], limit=4, num_fewshot=2, models="merge")
    assert opened == ["checkpoint"]


def test_an_evaluation_that_was_stopped_goes_on(suite, merged, monkeypatch):
    opened, open_model = [], Harness.open_model

    def stop_at_the_third(harness: Harness, model: Any, on_request: Any) -> Any:
        opened.append((model.adapter or model.folder).name)
        if len(opened) == 3:
            raise Stopped()
        return open_model(harness, model, on_request)

    monkeypatch.setattr(Harness, "open_model", stop_at_the_third)
    recipe = suite.recipe(tasks=["animals"], limit=3)
    with pytest.raises(Stopped):
        evaluate(recipe, str(merged), root=suite.root, console=QUIET)
    evaluate(recipe, str(merged), root=suite.root, console=QUIET)
    assert opened == ["base", "counting", "naming", "naming", "adapter", "checkpoint"]


def with_texts(suite: Suite, folder: Path, **sections: Any) -> Any:
    """The recipe with unlabeled texts for every task, and nothing that takes time."""
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"the {c} cat runs ."}) + "\n" for c in COLOURS))
    fields = copy.deepcopy(suite.fields) | {
        "coefficients": {"granularity": "task", "initial": 0.3},
        "retain": "none",
        "learning": {"steps": 1, "batch_size": 2},
        **sections,
    }
    for task in fields["tasks"].values():
        task["calibration"] = {"path": str(texts), "end_of_text": "leave"}
    return parse_recipe(fields, allow_code=True)


def test_a_search_by_its_score(suite, tmp_path):
    recipe = with_texts(
        suite,
        tmp_path,
        search={"evaluations": 4, "lm_eval": {"tasks": ["verbs"], "include_path": "own"}},
        evaluation={"task_arithmetic": [0.2, 0.6]},
    )
    out = tmp_path / "run"
    search(recipe, root=suite.root, out=out, console=QUIET)
    log = read_evaluations(out / "evaluations.jsonl")
    best = max(log, key=lambda evaluation: evaluation.score)
    model = AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    assert (
        best.score == best.tasks["verbs"] == pytest.approx(accuracies(model, DOCUMENTS["verbs"])[0])
    )
    assert json.loads((out / "run.json").read_text())["score"] == {
        "words": "lm-eval's score on verbs",
        "maximise": True,
    }


def test_a_task_without_its_data_loses_nothing(suite, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    data = tmp_path / "late.jsonl"
    (own / "late.yaml").write_text(TASK.format(name="late", file=data))
    recipe = with_texts(
        suite,
        tmp_path,
        evaluation={
            "baselines": "none",
            "lm_eval": {"tasks": ["late"], "include_path": str(own), "models": "merge"},
        },
    )
    out = tmp_path / "run"
    with pytest.raises(InputError, match="the task 'late' cannot be loaded") as caught:
        learn(recipe, root=tmp_path, out=out, console=QUIET)
    assert "--resume" in str(caught.value) and "\n" not in str(caught.value)
    assert {"checkpoint", "coefficients.safetensors", "report.html"} <= {
        path.name for path in out.iterdir()
    }
    data.write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS["verbs"]))
    learn(recipe, root=tmp_path, out=out, console=QUIET, resume=True)
    results = read_results(out / "results.json")
    assert results.rows == [] and scores_of(results.harness.rows[0])["late"]["acc"] >= 0
    page = write_page(out).read_text()
    assert 'id="lm-eval"' in page and "late, acc" in page


def test_results_that_were_changed_are_refused(merged: Path, tmp_path: Path):
    fields = json.loads((merged / "results.json").read_text())
    del fields["lm_eval"]["rows"][1]["tasks"][0]
    file = tmp_path / "results.json"
    file.write_text(json.dumps(fields))
    with pytest.raises(InputError, match="scores of 'counting' are others than 'base'"):
        read_results(file)


def refusal(suite: Suite, tmp_path: Path, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        suite.merge(tmp_path / "refused", **settings)
    assert not (tmp_path / "refused").exists()
    return str(caught.value)


def test_names_that_are_none(suite: Suite, tmp_path: Path):
    assert "near names are arc_easy" in refusal(suite, tmp_path, tasks=["arc_esy"])
    # A path would be opened as a task, and run its code.
    path = str(suite.tasks / "verbs.yaml")
    assert "has no task" in refusal(suite, tmp_path, tasks=[path])
    assert "humaneval runs code that the model" in refusal(suite, tmp_path, tasks=["humaneval"])
    folder = refusal(suite, tmp_path, tasks=["verbs"], include_path="nowhere")
    assert "include_path: nowhere is no folder" in folder


def test_tasks_of_ones_own_are_code(suite: Suite):
    fields = suite.fields | {"evaluation": {"lm_eval": {"tasks": ["x"], "include_path": "own"}}}
    with pytest.raises(InputError, match=r"lm_eval.include_path.*give --allow-code"):
        parse_recipe(fields)
    with pytest.raises(InputError, match=r"lm_eval.include_path.*give --allow-code"):
        Harness(LmEvalRecipe(tasks=["x"], include_path="own"), suite.root)
    # Those of the harness are not.
    parse_recipe(suite.fields | {"evaluation": {"lm_eval": ["arc_easy"]}})


def test_models_that_are_no_language_models(text_recipe, tmp_path):
    recipe = parse_recipe(text_recipe | {"evaluation": {"lm_eval": ["arc_easy"]}})
    with pytest.raises(InputError, match="lm-eval evaluates language models, and expert '"):
        merge(recipe, "average", {}, root=Path("/"), out=tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named_first(suite, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        harness_module, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name)
    )
    assert "adamerge_jax[lm-eval]" in refusal(suite, tmp_path, tasks=["verbs"])


def test_prompts_in_the_chat_template(suite: Suite, tmp_path: Path):
    out = suite.merge(tmp_path / "run", tasks=["verbs"], chat_template=True, models="merge")
    row = read_results(out / "results.json").harness.rows[-1]
    asked = [
        document | {"question": as_chat([{"role": "user", "content": document["question"]}])}
        for document in DOCUMENTS["verbs"]
    ]
    model = AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    measured = scores_of(row)["verbs"]
    assert (measured["acc"], measured["acc_norm"]) == pytest.approx(accuracies(model, asked))
    # An answer that was begun is gone on with.
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "runs"}]
    begun = TOKENIZER.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert _write_chat(out / "checkpoint", messages, False) == begun


def as_chat(messages: list[dict[str, str]]) -> str:
    return TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
