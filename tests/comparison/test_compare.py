"""Comparisons on tiny checkpoints: rows as other commands make them, kept, resumed and refused."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from adamerge_jax.cli import main as cli
from adamerge_jax.comparison.compare import compare_methods
from adamerge_jax.comparison.contenders import make_contenders, reference_contender
from adamerge_jax.comparison.saved import load, row_file
from adamerge_jax.comparison.worker import Job, JobFailed, run_here, run_in_process
from adamerge_jax.errors import InputError
from adamerge_jax.files.json_object import read_object
from adamerge_jax.pipeline.run_evaluate import evaluate
from adamerge_jax.recipes.loading import load_recipe
from adamerge_jax.runs.results import read_results
from tests.language_references import (
    TASKS,
    TEXTS,
    byte_tokenizer,
    give_data,
    save_models,
    split_sentences,
)
from tests.references import write_json_lines, write_recipe

QUIET = Console(quiet=True)
ENTRIES = ["average", "{ties: {density: [0.3, 0.5]}}", "dare", "recipe"]


class Recorder:
    """Runs jobs here, and remembers them."""

    def __init__(self, failing: dict[str, Exception] | None = None):
        self.names: list[str] = []
        self._failing = failing or {}

    def __call__(self, job: Job, report: Any) -> None:
        self.names.append(job.contender.name)
        if job.contender.name in self._failing:
            raise self._failing[job.contender.name]
        run_here(job, report)


@pytest.fixture(scope="module")
def compared(tmp_path_factory, image_fields) -> tuple[Path, Path]:
    """A recipe, and the folder of a comparison of it."""
    folder = tmp_path_factory.mktemp("compared")
    tasks = {
        task: fields | {"validation": fields["test"]}
        for task, fields in image_fields["tasks"].items()
    }
    recipe = write_recipe(folder, image_fields | {"tasks": tasks})
    out = folder / "out"
    compare_methods(
        load_recipe(recipe), ENTRIES, [0, 1], root=folder, out=out, console=QUIET, run_job=run_here
    )
    return recipe, out


@pytest.fixture
def language_recipe(tmp_path) -> dict[str, Any]:
    """A recipe for a Llama and its experts, on prompts with responses."""
    sizes = dict(
        vocab_size=len(byte_tokenizer()),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **special))
    rows = {
        task: [{"prompt": p, "response": r} for p, r in split_sentences(6, seed)]
        for seed, task in enumerate(TASKS)
    }
    fields = give_data(save_models(tmp_path, model, byte_tokenizer()), tmp_path, rows)
    general = [{"text": text} for text in TEXTS[:12]]
    retain = {"path": str(write_json_lines(tmp_path / "general.jsonl", general))}
    return fields | {"evaluation": {"exact_match": False}, "retain": retain}


def methods_of(out: Path) -> dict[str, dict[str, Any]]:
    return {m["name"]: m for m in read_object(out / "comparison.json")["methods"]}


def test_rows_are_those_of_other_commands(compared, tmp_path):
    recipe, out = compared
    methods = methods_of(out)
    assert methods["experts (one model each)"]["average"]["mean"] == 1.0
    main = ["merge", str(recipe), "--method", "average", "--out", str(tmp_path / "merged")]
    cli.main(main)
    checkpoint = str(tmp_path / "merged" / "checkpoint")
    row = evaluate(load_recipe(recipe), checkpoint, root=tmp_path, console=QUIET)
    tasks = methods["average"]["tasks"]
    assert {task: score["mean"] for task, score in tasks.items()} == pytest.approx(row.tasks)
    assert methods["dare"]["seeds"] == [0, 1]
    assert methods["recipe"]["steps"] == 3
    assert methods["recipe"]["peak_memory_bytes"] > 10**8


def test_validation_data_choose(compared):
    _, out = compared
    ties = methods_of(out)["ties (density 0.3 to 0.5, chosen with labels)"]
    assert ties["chosen"]["density"] in (0.3, 0.5)
    assert ties["seeds"] == [0]


def test_all_files_are_there(compared):
    _, out = compared
    assert {path.name for path in out.iterdir()} == {
        "rows",
        "comparison.json",
        "comparison.md",
        "comparison.png",
        "progress.log",
    }
    log = (out / "progress.log").read_text()
    assert "6 rows to measure" in log
    assert "recipe, seed 1: " in log
    assert "; 1 row left, about 0:0" in log
    assert "learning, step 3 of 3: held-out loss" in log


def test_rows_that_are_there_are_not_measured_again(compared):
    recipe, out = compared
    before = methods_of(out)
    jobs = Recorder()
    arguments = dict(root=recipe.parent, out=out, console=QUIET, run_job=jobs)
    compare_methods(load_recipe(recipe), ENTRIES, [0, 1], **arguments)
    assert jobs.names == []
    assert methods_of(out) == before
    compare_methods(load_recipe(recipe), ["average", "task_arithmetic"], [0, 1], **arguments)
    assert jobs.names == ["task_arithmetic"]


def test_a_row_is_of_its_recipe_models_and_data(compared):
    recipe, _ = compared
    root = recipe.parent
    loaded = load_recipe(recipe)

    def files(recipe, seeds=(0,)):
        contenders = [reference_contender(recipe), *make_contenders(recipe, ENTRIES, seeds)]
        return {c.name: row_file(root, c, recipe.seed, root) for c in contenders}

    before = files(loaded)
    assert files(loaded) == before
    steps = loaded.model_copy(update={"learning": loaded.learning.model_copy(update={"steps": 9})})
    assert {n for n, file in files(steps).items() if file != before[n]} == {"recipe"}
    other_length = loaded.model_copy(update={"max_length": 9})
    assert not set(files(other_length).values()) & set(before.values())
    data = Path(loaded.tasks["shape"].test.path)
    time = data.stat().st_mtime_ns
    os.utime(data, ns=(time, time + 10**9))
    try:
        assert not set(files(loaded).values()) & set(before.values())
    finally:
        os.utime(data, ns=(time, time))
    other = files(loaded, (1,))
    assert {n for n, f in other.items() if f == before[n]} == {"base and experts"}


def test_a_damaged_row_is_measured_again(compared, tmp_path, caplog):
    _, out = compared
    (row, *_) = (out / "rows").glob("average*")
    for text in ("{", '{"rows": []}', row.read_text().replace('"accuracy"', '"speed"')):
        (tmp_path / "row.json").write_text(text)
        assert load(tmp_path / "row.json") is None
        assert "is measured again" in caplog.text
    assert load(tmp_path / "none.json") is None
    assert load(row).rows[0].method == "average"


def test_a_stopped_comparison_goes_on(image_recipe, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, image_recipe))
    entries = ["average", "task_arithmetic"]
    jobs = Recorder({"task_arithmetic": KeyboardInterrupt()})
    arguments = dict(root=tmp_path, out=tmp_path / "out", console=QUIET)
    with pytest.raises(KeyboardInterrupt):
        compare_methods(recipe, entries, [0], **arguments, run_job=jobs)
    assert jobs.names == ["base and experts", "average", "task_arithmetic"]
    refused = Recorder({"task_arithmetic": JobFailed("no adapters", is_refused=True)})
    comparison = compare_methods(recipe, entries, [0], **arguments, run_job=refused)
    assert refused.names == ["task_arithmetic"]
    assert comparison.failed == {"task_arithmetic": "no adapters"}
    assert [m.name for m in comparison.methods][-1] == "average"
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "task_arithmetic has no row: no adapters" in page


def test_what_is_refused_with_one_seed_is_not_tried_with_others_or_other_heads(compared):
    recipe, out = compared
    refusal = JobFailed("no adapters", is_refused=True)
    jobs = Recorder({"knots": refusal, "base, heads refitted": refusal})
    comparison = compare_methods(
        load_recipe(recipe),
        ["knots", "average"],
        [0, 1],
        ["kept", "refitted"],
        root=recipe.parent,
        out=out,
        console=QUIET,
        run_job=jobs,
    )
    assert jobs.names.count("knots") == 1
    assert comparison.failed["knots, heads refitted"] == "no adapters"
    for is_refused, tries in ((True, 1), (False, 2)):
        jobs = Recorder({"adamerging": JobFailed("no memory", is_refused=is_refused)})
        compare_methods(
            load_recipe(recipe),
            ["adamerging"],
            [0, 1],
            root=recipe.parent,
            out=out,
            console=QUIET,
            run_job=jobs,
        )
        assert jobs.names == ["adamerging"] * tries


def test_nothing_is_compared_without_base_and_experts(image_recipe, tmp_path):
    image_recipe["tasks"]["shape"]["test"]["path"] = str(tmp_path / "none.npz")
    recipe = load_recipe(write_recipe(tmp_path, image_recipe))
    with pytest.raises(InputError, match=r"none\.npz"):
        compare_methods(
            recipe,
            ["average"],
            root=tmp_path,
            out=tmp_path / "out",
            console=QUIET,
            run_job=run_here,
        )


def test_heads_are_those_that_learning_gives_its_baselines(image_recipe, tmp_path):
    learning = {"steps": 1, "batch_size": 4}
    recipe = write_recipe(tmp_path, image_recipe | {"heads": "refitted", "learning": learning})
    comparison = compare_methods(
        load_recipe(recipe),
        ["average", "recipe"],
        [0],
        root=tmp_path,
        out=tmp_path / "out",
        console=QUIET,
        run_job=run_here,
    )
    cli.main(["learn", str(recipe), "--out", str(tmp_path / "run")])
    rows = {row.method: row for row in read_results(tmp_path / "run" / "results.json").rows}
    rows["recipe"] = rows.pop("learned (tensor, heads refitted)")
    methods = {method.name: method for method in comparison.methods}
    assert methods.keys() < rows.keys()
    assert {"base, heads refitted", "average, heads refitted"} < methods.keys()
    for name, method in methods.items():
        scores = {task: spread.mean for task, spread in method.tasks.items()}
        assert scores == pytest.approx(rows[name].tasks), name
        assert method.kind == rows[name].kind


def test_a_folder_of_something_else_is_left_alone(image_recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    recipe = load_recipe(write_recipe(tmp_path, image_recipe))
    with pytest.raises(InputError, match=r"holds 'thesis\.txt', which is no file of a comparison"):
        compare_methods(recipe, root=tmp_path, out=tmp_path / "out", console=QUIET)


def test_test_examples_are_the_same_for_all_seeds(image_recipe, tmp_path):
    for fields in image_recipe["tasks"].values():
        fields["test"]["limit"] = 11
    recipe = load_recipe(write_recipe(tmp_path, image_recipe))
    rows = []
    for seed in (0, 1):
        contender = make_contenders(recipe, ["average"], [seed])[0]
        job = Job(contender, 0, tmp_path, tmp_path / f"{seed}.json", tmp_path / "state")
        run_here(job, lambda line: None)
        rows.append(load(job.file).rows[0].examples)
    for task, scores in rows[0].items():
        assert scores.values.tolist() == rows[1][task].values.tolist()


def test_the_command_measures_in_processes(image_recipe, tmp_path, capsys):
    recipe = write_recipe(tmp_path, image_recipe)
    out = tmp_path / "out"
    command = ["compare-methods", str(recipe), "--methods", "average", "--seeds", "0"]
    cli.main([*command, "--out", str(out)])
    printed = capsys.readouterr().out
    assert "Accuracy (%)" in printed
    assert f"tables  {out / 'comparison.md'}" in printed
    assert list(methods_of(out)) == ["base", "experts (one model each)", "average"]


@pytest.mark.parametrize(
    ("ending", "message", "is_refused"),
    [
        ("echo 'error: no expert differs' >&2; exit 2", "^no expert differs$", True),
        ("echo 'Traceback'; echo 'ValueError: 3' >&2; exit 1", "^ValueError: 3$", False),
        ("kill -9 $$", "ended by signal 9; was memory short", False),
    ],
)
def test_the_end_of_a_process(compared, tmp_path, monkeypatch, ending, message, is_refused):
    recipe, _ = compared
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nread order\necho working\n{ending}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    contender = make_contenders(load_recipe(recipe), ["average"], [0])[0]
    job = Job(contender, 0, tmp_path, tmp_path / "row.json", tmp_path / "state")
    lines: list[str] = []
    with pytest.raises(JobFailed, match=message) as failure:
        run_in_process(job, lines.append)
    assert failure.value.is_refused is is_refused
    assert lines[0] == "working"
    assert json.dumps(lines)


def test_language_models_are_compared_by_all_their_metrics(language_recipe, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, language_recipe))
    comparison = compare_methods(
        recipe,
        ["average"],
        [0],
        root=tmp_path,
        out=tmp_path / "out",
        console=QUIET,
        run_job=run_here,
    )
    metrics = [comparison.metric, *(table.metric for table in comparison.further)]
    assert metrics[0] == "loss"
    assert {"token_accuracy", "answer_loss"} & set(metrics)
    contender = make_contenders(recipe, ["average"], [0], fits=())[0]
    saved = load(row_file(tmp_path / "out" / "rows", contender, 0, tmp_path))
    row = saved.rows[0]
    for table in (comparison, *comparison.further):
        (method,) = [m for m in table.methods if m.name == "average"]
        (by_metric,) = [r for r in (row, *row.further) if r.metric == table.metric]
        assert method.average.mean == pytest.approx(by_metric.average)
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "## Loss (nats per token)" in page
    assert "## Token accuracy" in page
    (general,) = [table for table in comparison.further if table.metric == "base_divergence"]
    base, merged = general.methods
    assert base.tasks["general text"].mean == pytest.approx(0, abs=1e-5)
    assert merged.tasks["general text"].mean > 1e-4
    assert merged.standing.score.interval is None
