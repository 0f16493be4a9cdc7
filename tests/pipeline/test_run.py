"""Whole runs of the command line on tiny checkpoints, and what other programs make of them."""

import html
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.orbax import load_parameters
from adamerge_jax.cli import main as cli
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.models.layers import Outputs
from adamerge_jax.parameter_names import is_stacked, tensors_of
from adamerge_jax.pipeline.export import export
from adamerge_jax.pipeline.export_job import export_job
from adamerge_jax.pipeline.fold import fold
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.pipeline.read import load_head, load_zero_shot_head
from adamerge_jax.pipeline.workspace import open_workspace
from adamerge_jax.recipes.loading import load_recipe, parse_recipe
from adamerge_jax.runs.predictions import read_predictions
from adamerge_jax.runs.results import read_results
from adamerge_jax.runs.rows import Row
from adamerge_jax.runs.tracking import flatten
from adamerge_jax.runs.without_experts import read_without_experts
from tests.references import (
    BERT,
    LEARNING,
    TEXT_TASKS,
    parameters_of,
    random_coefficients,
    read_events,
    write_recipe,
)


class Run(NamedTuple):
    """A finished run of `adamerge learn`."""

    recipe: Path
    folder: Path

    @property
    def results(self) -> list[dict[str, Any]]:
        return json.loads((self.folder / "results.json").read_text())["rows"]

    def merged(self) -> dict[str, np.ndarray]:
        """The tensors that the checkpoint is to hold, merged anew from the coefficients."""
        recipe = load_recipe(self.recipe)
        models = open_models(recipe, self.recipe.parent)
        coefficients = Coefficients.load(self.folder / "coefficients.safetensors")
        return dict(fold(models, coefficients))

    def outputs(self, inputs: Mapping[str, np.ndarray]) -> tuple[Outputs, dict[str, np.ndarray]]:
        """What our merged model computes: the backbone's outputs and the logits of each task."""
        recipe = load_recipe(self.recipe)
        models = open_models(recipe, self.recipe.parent)
        backbone = models.family.build_backbone(models.config)
        outputs = backbone(parameters_of(backbone, self.merged()), inputs)
        logits = {}
        for task, expert in models.experts.items():
            head = models.family.build_head(expert.checkpoint.config)
            if models.family.auto_class is None:
                names = [
                    f.name.replace("_", " ") for f in sorted(image_folder(recipe, task).iterdir())
                ]
                parameters = load_zero_shot_head(models, names, recipe.tasks[task].templates)
            else:
                parameters = load_head(models, task)
            logits[task] = np.asarray(head(parameters, outputs))
        return outputs, logits


def image_folder(recipe: Any, task: str) -> Path:
    return Path(recipe.tasks[task].test.path) / recipe.tasks[task].test.split


def learn(folder: Path, fields: Mapping[str, Any], *options: str) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    recipe = write_recipe(folder, fields)
    cli.main(["learn", str(recipe), "--out", str(folder / "run"), *options])
    return Run(recipe, folder / "run")


def weights(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint, from one file or several."""
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.fixture(scope="module")
def text_run(text_fields, tmp_path_factory, drawn_figures) -> Run:
    fields = text_fields | {"export": {"shard_megabytes": 1}, "tracking": ["tensorboard"]}
    fields["evaluation"] = {"without_experts": True}
    with drawn_figures():
        return learn(tmp_path_factory.mktemp("text-run"), fields)


@pytest.fixture(scope="module")
def image_run(image_fields, tmp_path_factory) -> Run:
    return learn(tmp_path_factory.mktemp("image-run"), image_fields)


@pytest.fixture(scope="module")
def clip_run(clip_fields, tmp_path_factory) -> Run:
    fields = clip_fields | {"learning": LEARNING | {"batch_size": 2}}
    return learn(tmp_path_factory.mktemp("clip-run"), fields)


SCRIPT = """
import json, sys
import numpy as np, torch, transformers
for job in json.load(open(sys.argv[1])):
    loader = getattr(transformers, job["class"])
    model, info = loader.from_pretrained(job["folder"], output_loading_info=True)
    inputs = {name: torch.from_numpy(array) for name, array in np.load(job["inputs"]).items()}
    with torch.no_grad():
        outputs = getattr(model.eval(), job["method"])(**inputs)
    missing = sorted(info["missing_keys"])
    np.savez(job["outputs"], values=outputs[job["field"]].numpy(), missing=missing)
assert not any(name.startswith("adamerge_jax") for name in sys.modules)
"""


class Opened(NamedTuple):
    """What `transformers` made of a folder."""

    values: np.ndarray
    missing: list[str]


def text_inputs(recipe: Path, task: str) -> dict[str, np.ndarray]:
    fields = yaml.safe_load(recipe.read_text())["tasks"][task]
    rows = [json.loads(line) for line in Path(fields["test"]["path"]).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(fields["expert"])
    return dict(tokenizer([row["text"] for row in rows], padding=True, return_tensors="np"))


def image_inputs(recipe: Path, task: str) -> dict[str, np.ndarray]:
    file = yaml.safe_load(recipe.read_text())["tasks"][task]["test"]["path"]
    return {"pixel_values": np.load(file)["pixel_values"]}


def clip_inputs(recipe: Path, task: str) -> dict[str, np.ndarray]:
    processor = AutoImageProcessor.from_pretrained(load_recipe(recipe).base.path)
    files = sorted(image_folder(load_recipe(recipe), task).rglob("*.png"))
    return dict(processor([Image.open(file) for file in files], return_tensors="np"))


@pytest.fixture(scope="module")
def opened(text_run, image_run, clip_run, tmp_path_factory) -> dict[tuple[str, str], Opened]:
    """What `transformers` computes with every exported folder, in a process without this package.

    By kind of model and task, `""` for the backbone.
    """
    folder = tmp_path_factory.mktemp("opened")
    jobs = []

    def ask(kind, task, run, inputs, loader, field, method="__call__"):
        place = folder / f"{kind}-{task}"
        np.savez(f"{place}.inputs.npz", **inputs)
        checkpoint = run.folder / "checkpoint"
        jobs.append(
            {
                "key": (kind, task),
                "class": loader,
                "folder": str(checkpoint / "tasks" / task if task else checkpoint),
                "inputs": f"{place}.inputs.npz",
                "outputs": f"{place}.outputs.npz",
                "field": field,
                "method": method,
            }
        )

    ask("text", "", text_run, text_inputs(text_run.recipe, "tone"), "AutoModel", "pooler_output")
    for task in TEXT_TASKS:
        inputs = text_inputs(text_run.recipe, task)
        ask("text", task, text_run, inputs, "AutoModelForSequenceClassification", "logits")
    inputs = image_inputs(image_run.recipe, "shape")
    ask("image", "", image_run, inputs, "AutoModel", "last_hidden_state")
    ask("image", "shape", image_run, inputs, "AutoModelForImageClassification", "logits")
    inputs = clip_inputs(clip_run.recipe, "birds")
    ask("clip", "", clip_run, inputs, "AutoModel", "pooler_output", "get_image_features")

    (folder / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([sys.executable, "-I", "-c", SCRIPT, str(folder / "jobs.json")], check=True)
    results = {}
    for job in jobs:
        with np.load(job["outputs"]) as file:
            results[job["key"]] = Opened(file["values"], file["missing"].tolist())
    return results


def test_a_run_leaves_everything(text_run):
    assert sorted(file.name for file in text_run.folder.iterdir()) == [
        "checkpoint",
        "coefficients.png",
        "coefficients.safetensors",
        "metrics.jsonl",
        "orbax",
        "predictions.json",
        "recipe.yaml",
        "report",
        "report.html",
        "results.json",
        "run.json",
        "tensorboard",
        "without_experts.json",
    ]
    assert load_recipe(text_run.folder / "recipe.yaml") == load_recipe(text_run.recipe)
    with Image.open(text_run.folder / "coefficients.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 200
        assert len(image.convert("RGB").getcolors(2**24)) > 50


def test_predictions_are_those_of_the_table(text_run):
    predictions = read_predictions(text_run.folder / "predictions.json")
    rows = {row.kind: row for row in read_results(text_run.folder / "results.json").rows}
    for task, of_task in predictions.items():
        total = sum(one.count for one in of_task.counts)
        right = sum(one.count for one in of_task.counts if one.label == one.merge)
        assert right / total == pytest.approx(rows["learned"].tasks[task])
        lead = of_task.expert_alone_right - of_task.merge_alone_right
        assert rows["experts"].tasks[task] * total == pytest.approx(right + lead)
        for one in of_task.differences:
            assert one.expert != one.merge and one.text
    assert predictions.keys() == TEXT_TASKS.keys()
    assert any(of_task.differences for of_task in predictions.values())
    page = (text_run.folder / "report.html").read_text()
    assert "the label down, what the merge says across" in page


def test_metrics(text_run):
    lines = (text_run.folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert records[0]["objective"] is None
    assert records[0]["held_out"].keys() == TEXT_TASKS.keys()
    for record in records[1:]:
        assert record["objective"].keys() == record["held_out"].keys() == TEXT_TASKS.keys()
        assert all(0 < value < np.log(4) for value in record["objective"].values())
        assert record["seconds"] > 0
    held_out = [sum(record["held_out"].values()) for record in records]
    coefficients = Coefficients.load(text_run.folder / "coefficients.safetensors")
    assert coefficients.step == int(np.argmin(held_out)) > 0


def test_tensorboard_gets_what_the_file_gets(text_run):
    lines = (text_run.folder / "metrics.jsonl").read_text().splitlines()
    events = read_events(text_run.folder / "tensorboard" / "learning")
    assert list(events) == [0, 1, 2, 3]
    for record in map(json.loads, lines):
        # Event files hold float32.
        assert events[record["step"]] == pytest.approx(flatten(record), rel=1e-6)


def test_the_record(text_run, text_fields):
    record = json.loads((text_run.folder / "run.json").read_text())
    assert list(record["seconds"]) == [
        "opening models and data",
        "task vectors and the experts' answers",
        "similarity of the task vectors",
        "learning",
        "writing checkpoints",
        "evaluating",
    ]
    for task, own in record["examples"].items():
        rows = Path(text_fields["tasks"][task]["calibration"]).read_text().splitlines()
        assert own["learning"] + own["held_out"] == len(rows)
    models = open_models(load_recipe(text_run.recipe), text_run.recipe.parent)
    coefficients = Coefficients.load(text_run.folder / "coefficients.safetensors")
    tensors = record["tensors"]
    assert tensors["merged"] == len(coefficients.parameters)
    apart = [*coefficients.parameters, *tensors["kept"], *tensors["unchanged"]]
    assert sorted(apart) == sorted(models.base.names)
    # The similarity of the task vectors, from the checkpoints alone.
    vectors = np.stack(
        [
            np.concatenate(
                [
                    (expert.read(name).astype(np.float64) - models.base.read(name)).ravel()
                    for name in coefficients.parameters
                ]
            )
            for expert in models.experts.values()
        ]
    )
    norms = np.linalg.norm(vectors, axis=1)
    cosines = vectors @ vectors.T / np.outer(norms, norms)
    similarity = record["similarity"]
    assert similarity["experts"] == list(TEXT_TASKS)
    np.testing.assert_allclose(similarity["norms"], norms, rtol=1e-5)
    np.testing.assert_allclose(similarity["cosines"], cosines, atol=2e-6)
    # Squared norms of layers add up to those of the whole.
    by_layer = np.array([own["norms"] for own in similarity["layers"].values()])
    np.testing.assert_allclose((by_layer**2).sum(0), norms**2, rtol=1e-5)


def test_results(text_run):
    file = json.loads((text_run.folder / "results.json").read_text())
    assert list(file) == ["rows", "outcome"]
    for row in file["rows"]:
        assert list(row) == ["method", "kind", "metric", "tasks", "average"]
        assert list(row["tasks"]) == list(TEXT_TASKS)
        assert row["average"] == pytest.approx(np.mean(list(row["tasks"].values())))
    rows = {row["method"]: row for row in file["rows"]}
    assert list(rows) == [
        "base",
        "experts (one model each)",
        "average",
        "task arithmetic (0.3)",
        "learned (tensor)",
    ]
    assert [row["kind"] for row in file["rows"]] == [
        *("baseline", "experts", "baseline", "baseline", "learned")
    ]
    # What is said of the merge is what the rows say.
    outcome, average = file["outcome"], rows["learned (tensor)"]["average"]
    without = ["base", "average", "task arithmetic (0.3)"]
    best = max(without, key=lambda method: rows[method]["average"])
    assert outcome["reference"] == best
    assert outcome["average"]["score"]["value"] == pytest.approx(average)
    assert outcome["average"]["share"]["value"] == pytest.approx(average)  # the experts' is 1
    low, high = outcome["average"]["share"]["interval"]
    assert low <= average <= high
    assert (high - low) > 0
    expected = (average - rows[best]["average"]) / (1 - rows[best]["average"])
    assert outcome["average"]["closed"]["value"] == pytest.approx(expected)
    page = html.unescape((text_run.folder / "report.html").read_text())
    assert "of the experts' average" in page
    assert "of the experts' average" in (text_run.folder / "checkpoint/README.md").read_text()
    # The labels are what the experts predict, so each expert is right about all of them.
    assert rows["experts (one model each)"]["average"] == 1.0
    assert rows["base"]["average"] < 1.0


def test_coefficients_say_where_they_come_from(text_run, text_fields):
    coefficients = Coefficients.load(text_run.folder / "coefficients.safetensors")
    assert coefficients.base.source == text_fields["base"]
    assert [expert.name for expert in coefficients.experts] == list(TEXT_TASKS)
    for expert in coefficients.experts:
        folder = text_fields["tasks"][expert.name]["expert"]
        assert expert.source == folder
        assert expert.identity == Checkpoint.open(folder).identity()
    assert coefficients.values.keys() == set(coefficients.parameters)
    assert max(abs(values - 0.3).max() for values in coefficients.values.values()) > 0.01


def test_the_checkpoint_is_the_merge_in_several_files(text_run):
    checkpoint = text_run.folder / "checkpoint"
    sizes = [file.stat().st_size for file in checkpoint.glob("*.safetensors")]
    assert len(sizes) > 1
    assert max(sizes) < 1.1e6
    written = weights(checkpoint)
    merged = text_run.merged()
    assert written.keys() == merged.keys()
    for name, array in merged.items():
        np.testing.assert_array_equal(written[name], array)
    card = (checkpoint / "README.md").read_text()
    assert "| learned (tensor) |" in card
    assert all(task in card for task in TEXT_TASKS)


def test_shared_weights_are_on_the_disk_once(text_run):
    checkpoint = text_run.folder / "checkpoint"
    first = min(checkpoint.glob("*.safetensors")).stat().st_ino
    for task in TEXT_TASKS:
        assert min((checkpoint / "tasks" / task).glob("*.safetensors")).stat().st_ino == first


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_transformers_opens_text_models(text_run, opened, task):
    _, logits = text_run.outputs(text_inputs(text_run.recipe, task))
    result = opened["text", task]
    assert result.missing == []
    np.testing.assert_allclose(result.values, logits[task], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(result.values.argmax(-1), logits[task].argmax(-1))
    # The accuracy in the table is that of the exported model.
    file = load_recipe(text_run.recipe).tasks[task].test.path
    labels = [json.loads(line)["label"] for line in Path(file).read_text().splitlines()]
    accuracy = (result.values.argmax(-1) == labels).mean()
    assert text_run.results[-1]["tasks"][task] == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("kind", "task", "missing"),
    [
        ("text", "", []),
        ("image", "", ["pooler.dense.bias", "pooler.dense.weight"]),  # ViTModel's own, unused
        ("image", "shape", []),
        ("clip", "", []),
    ],
)
def test_transformers_opens_backbones_and_image_models(kind, task, missing, opened, request):
    run = request.getfixturevalue(f"{kind}_run")
    inputs = {"text": text_inputs, "image": image_inputs, "clip": clip_inputs}[kind]
    first = {"text": "tone", "image": "shape", "clip": "birds"}[kind]
    outputs, logits = run.outputs(inputs(run.recipe, first))
    of_backbone = outputs.last_hidden_state if kind == "image" else outputs.pooled
    result = opened[kind, task]
    assert result.missing == missing
    expected = logits[task] if task else of_backbone
    np.testing.assert_allclose(result.values, expected, rtol=0, atol=1e-4)


def test_the_orbax_checkpoint_holds_the_same(text_run):
    merged = text_run.merged()
    parameters = load_parameters(text_run.folder / "orbax")
    seen = set()
    for name, array in parameters.items():
        tensors = tensors_of(name, array.shape)
        rows = array if is_stacked(name) else [array]
        for tensor, row in zip(tensors, rows, strict=True):
            np.testing.assert_array_equal(row, merged[tensor])
            seen.add(tensor)
    assert seen == merged.keys()


def test_fold_writes_the_same_checkpoint(text_run, tmp_path):
    file = text_run.folder / "coefficients.safetensors"
    cli.main(["fold", str(text_run.recipe), str(file), "--out", str(tmp_path / "out")])
    for folder in [Path("checkpoint"), *(Path("checkpoint/tasks") / task for task in TEXT_TASKS)]:
        learned, folded = weights(text_run.folder / folder), weights(tmp_path / "out" / folder)
        assert folded.keys() == learned.keys()
        for name, array in learned.items():
            np.testing.assert_array_equal(folded[name], array)
            assert folded[name].dtype == array.dtype
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["checkpoint", "orbax"]


@pytest.mark.parametrize("preset", ["self-positioning", "symerge"])
def test_what_a_preset_learned_is_folded_to_the_same_bytes(preset, image_recipe, tmp_path):
    """A position with its scale, and clipped coefficients with learned heads."""
    # From few of the experts, so that the last steps are better than the start.
    fields = image_recipe | {
        "preset": preset,
        "coefficients": {"initial": 0.1},
        "learning": LEARNING,
    }
    run = learn(tmp_path, fields, "--export.no-orbax")
    file = run.folder / "coefficients.safetensors"
    learned = Coefficients.load(file)
    moved = max(np.abs(values - learned.initial).max() for values in learned.values.values())
    assert learned.step > 0 and moved > 1e-4
    out = tmp_path / "folded"
    cli.main(["fold", str(run.recipe), str(file), "--out", str(out), "--export.no-orbax"])
    written = sorted((run.folder / "checkpoint").rglob("*.safetensors"))
    assert {path.parent.name for path in written} == {"checkpoint", *image_recipe["tasks"]}
    for path in written:
        assert path.read_bytes() == (out / path.relative_to(run.folder)).read_bytes(), path


def test_fold_without_an_orbax_checkpoint(text_run, tmp_path):
    # A run folder stands for its coefficients.
    out = tmp_path / "out"
    arguments = [str(text_run.recipe), str(text_run.folder), "--out", str(out)]
    arguments.append("--export.no-orbax")
    cli.main(["fold", *arguments])
    assert [folder.name for folder in out.iterdir()] == ["checkpoint"]


def test_fold_refuses_a_disk_too_full_for_both_checkpoints(text_run, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 3 * 10**6))
    file, out = text_run.folder / "coefficients.safetensors", tmp_path / "out"
    with pytest.raises(SystemExit):
        cli.main(["fold", str(text_run.recipe), str(file), "--out", str(out)])
    assert "3.9 MB will be written" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("kind", ["text", "clip"])
def test_evaluate_gives_the_learned_row(kind, request, capsys):
    run = request.getfixturevalue(f"{kind}_run")
    checkpoint = {"text": run.folder, "clip": run.folder / "checkpoint"}[kind]
    cli.main(["evaluate", str(run.recipe), "--checkpoint", str(checkpoint)])
    printed = capsys.readouterr().out
    learned = run.results[-1]
    cells = [f"{100 * value:.1f}" for value in [*learned["tasks"].values(), learned["average"]]]
    line = next(line for line in printed.splitlines() if cells[-1] in line)
    assert line.replace("│", " ").split()[-len(cells) :] == cells


def test_scores_without_an_expert_are_those_of_a_fold_without_it(text_run):
    recipe = load_recipe(text_run.recipe)
    workspace = open_workspace(recipe, text_run.recipe.parent)
    coefficients = Coefficients.load(text_run.folder / "coefficients.safetensors")
    rows = read_without_experts(
        text_run.folder / "without_experts.json", Row.from_json(text_run.results[-1])
    )
    assert [row.method for row in rows] == list(recipe.tasks)
    for row in rows:
        merged = dict(fold(workspace.models, coefficients.times({row.method: 0})))
        backbone = workspace.models.family.build_backbone(workspace.models.config)
        scores = workspace.evaluator.row("", parameters_of(backbone, merged), workspace.data.test)
        assert row.tasks == scores.tasks
    assert len({tuple(row.tasks.values()) for row in rows}) > 1


def test_inspect_and_compare_take_run_folders(text_run, capsys):
    file = text_run.folder / "coefficients.safetensors"
    printed = []
    for path in (file, text_run.folder):
        cli.main(["inspect", str(path)])
        cli.main(["compare", str(path), str(file)])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    # The results beside the file are found too.
    assert "first: The merge reaches" in printed[1]


def test_inspect(text_run, capsys):
    cli.main(["inspect", str(text_run.folder / "coefficients.safetensors")])
    printed = capsys.readouterr().out
    assert "granularity    tensor" in printed
    assert "constraint     clip" in printed
    assert "bert.encoder.layer.3" in printed
    coefficients = Coefficients.load(text_run.folder / "coefficients.safetensors")
    pooler = [v for group, v in coefficients.values.items() if group.startswith("bert.pooler")]
    line = next(line for line in printed.splitlines() if "bert.pooler" in line)
    for mean in np.mean(pooler, axis=0):
        assert f"{mean:.3f}" in line


def test_a_base_with_a_head_of_its_own(text_recipe, text_run, tmp_path):
    """The base is itself a task's model: its head must not take the place of the experts'."""
    shutil.copytree(text_recipe["base"], tmp_path / "base")
    base = BertForSequenceClassification(BertConfig(**BERT, num_labels=7))
    base.bert.load_state_dict(BertModel.from_pretrained(text_recipe["base"]).state_dict())
    base.save_pretrained(tmp_path / "base")
    run = learn(tmp_path, text_recipe | {"base": str(tmp_path / "base")})
    checkpoint = run.folder / "checkpoint"
    backbone, expected = weights(checkpoint), weights(text_run.folder / "checkpoint")
    assert backbone.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(backbone[name], array)
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]
    for task, fields in text_recipe["tasks"].items():
        expert = load_file(Path(fields["expert"]) / "model.safetensors")
        model = weights(checkpoint / "tasks" / task)
        assert model.keys() == backbone.keys() | {"classifier.weight", "classifier.bias"}
        np.testing.assert_array_equal(model["classifier.weight"], expert["classifier.weight"])


@pytest.mark.parametrize("owner", ["base", "tone"])
def test_task_models_of_experts_without_a_tokenizer(text_recipe, tmp_path, owner):
    """As training leaves them: what reads texts is that of the run, else it would be none."""
    every = {"base": text_recipe} | text_recipe["tasks"]
    for name, fields in every.items():
        field = "base" if name == "base" else "expert"
        folder = shutil.copytree(fields[field], tmp_path / name)
        fields[field] = str(folder)
        for file in () if name == owner else ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).unlink()
    recipe = parse_recipe(text_recipe)
    models = open_models(recipe, tmp_path)
    coefficients, out = random_coefficients(models), tmp_path / "out"
    export(export_job(models, coefficients, recipe.export, tmp_path, []), out, Console(quiet=True))
    for folder in ("", *(f"tasks/{task}" for task in TEXT_TASKS)):
        tokenizer = AutoTokenizer.from_pretrained(out / "checkpoint" / folder)
        assert tokenizer.tokenize("a b") == ["a", "b"]


def test_vision_transformer(image_run):
    rows = {row["method"]: row["tasks"] for row in image_run.results}
    assert rows["experts (one model each)"] == {"shape": 1.0, "colour": 1.0}
    assert not list((image_run.folder / "checkpoint").glob("*.index.json"))


def test_clip(clip_run):
    """As experiments/recipes/clip_vit_b32_8tasks.yaml, but tiny."""
    assert [list(row["tasks"]) for row in clip_run.results] == [["animals", "birds"]] * 5
    written = weights(clip_run.folder / "checkpoint")
    base = load_file(Path(load_recipe(clip_run.recipe).base.path) / "model.safetensors")
    # A whole CLIP: the text tower and the projections are the base's.
    assert written.keys() == base.keys()
    for name, array in base.items():
        same = np.array_equal(written[name], array)
        assert same == (not name.startswith("vision_model.") or name.endswith("k_proj.bias")), name
    # The accuracy in the table is that of the exported model with heads from the class names.
    inputs = clip_inputs(clip_run.recipe, "birds")
    _, logits = clip_run.outputs(inputs)
    labels = np.repeat([0, 1, 2], 4)
    accuracy = (logits["birds"].argmax(-1) == labels).mean()
    assert clip_run.results[-1]["tasks"]["birds"] == pytest.approx(accuracy)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_export_in_another_dtype(text_run, tmp_path, dtype):
    file = text_run.folder / "coefficients.safetensors"
    out = str(tmp_path / "out")
    options = ["--out", out, "--export.dtype", dtype]
    cli.main(["fold", str(text_run.recipe), str(file), *options])
    checkpoint = tmp_path / "out" / "checkpoint"
    exact = weights(text_run.folder / "checkpoint" / "tasks" / "mood")
    for name, array in weights(checkpoint / "tasks" / "mood").items():
        assert array.dtype.name == dtype
        np.testing.assert_array_equal(array, exact[name].astype(array.dtype))
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["dtype"] == dtype
    parameters = load_parameters(tmp_path / "out" / "orbax").values()
    assert {array.dtype.name for array in parameters} == {dtype}
    half = BertForSequenceClassification.from_pretrained(checkpoint / "tasks" / "mood")
    assert half.dtype == getattr(torch, dtype)


def test_validation_data_chooses_task_arithmetic(image_recipe, tmp_path):
    for task in image_recipe["tasks"].values():
        task["validation"] = task["test"]
    image_recipe["evaluation"] = {"task_arithmetic": [0.0, 0.5, 1.0]}
    run = learn(tmp_path, image_recipe)
    rows = {row["method"]: row["average"] for row in run.results}
    chosen = next(method for method in rows if method.startswith("task arithmetic"))
    # Chosen on what it is tested on, so it is at least as good as the candidates in the table:
    # 0 is the base, 0.5 the average of two.
    names = [f"task arithmetic ({value}, chosen with labels)" for value in ("0", "0.5", "1")]
    assert chosen in names
    assert rows[chosen] >= max(rows["base"], rows["average"])


def test_coefficients_that_leave_a_sensible_range(image_recipe, tmp_path, caplog, capsys):
    """Entropy is lowest where logits are largest: the objective falls, and nothing is learned."""
    image_recipe["coefficients"] = {"constraint": "free", "granularity": "task"}
    image_recipe["learning"]["optimizer"] = {"name": "sgd", "learning_rate": 300.0}
    run = learn(tmp_path, image_recipe)
    coefficients = Coefficients.load(run.folder / "coefficients.safetensors")
    assert coefficients.initial == 0.3
    assert np.abs(coefficients.values["all"]).max() > 10
    assert "2 coefficients are outside of -2 to 3" in caplog.text
    assert "are outside of -2 to 3" in (run.folder / "report.html").read_text()
    assert "steps, chosen by the held-out objective alone)" in capsys.readouterr().out


def test_aligning_with_the_experts(text_recipe, tmp_path):
    text_recipe["objectives"] = [{"name": "logit_alignment"}, {"name": "entropy", "weight": 0.5}]
    text_recipe["learning"]["steps"] = 20
    for task in text_recipe["tasks"].values():
        del task["test"]
    run = learn(tmp_path, text_recipe)
    coefficients = Coefficients.load(run.folder / "coefficients.safetensors")
    assert coefficients.objective == "logit_alignment + 0.5 entropy"
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    evaluations = [record["held_out"] for record in map(json.loads, lines) if record["held_out"]]
    assert sum(evaluations[-1].values()) < sum(evaluations[0].values())


def test_options_override_the_recipe(image_recipe, tmp_path):
    run = learn(tmp_path, image_recipe, "--learning.steps", "2", "--coefficients.initial", "0.5")
    resolved = load_recipe(run.folder / "recipe.yaml")
    assert resolved.learning.steps == 2
    coefficients = Coefficients.load(run.folder / "coefficients.safetensors")
    assert all(abs(values - 0.5).max() < 0.1 for values in coefficients.values.values())
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_relative_paths_start_at_the_root(image_fields, tmp_path):
    root = Path(image_fields["base"]).parent
    fields = {
        "base": "base",
        "tasks": {
            name: {"expert": name, "calibration": f"{name}.npz"} for name in image_fields["tasks"]
        },
        "learning": LEARNING,
    }
    run = learn(tmp_path, fields, "--root", str(root), "--learning.steps", "1")
    assert (run.folder / "checkpoint" / "config.json").is_file()
    # The card takes none of these names for those of the Hub, and the report says what is missing.
    assert "base_model" not in (run.folder / "checkpoint" / "README.md").read_text()
    assert "the recipe names no test data" in (run.folder / "report.html").read_text()
