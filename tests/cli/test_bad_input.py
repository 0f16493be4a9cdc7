"""What is wrong with the input is said in one line, and nothing is left behind."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from adamerge_jax.cli import main as cli
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.recipes.loading import parse_recipe
from tests.references import (
    edit_weights,
    random_coefficients,
    write_json_lines,
    write_recipe,
)

QUERY = "bert.encoder.layer.1.attention.self.query.weight"

Fields = dict[str, Any]


def failure(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Runs the command line and returns its exit status and what it says on standard error."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    said = capfd.readouterr().err
    assert said.endswith("\n")
    assert len(said.splitlines()) == 1, said
    return caught.value.code, said


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Learning from a recipe exits with 2, says all of `names` in one line, and writes nothing."""

    def check(fields: Fields, *names: str) -> str:
        out = tmp_path / "out"
        recipe = write_recipe(tmp_path, fields)
        status, said = failure(capfd, "learn", str(recipe), "--out", str(out))
        assert status == 2
        assert said.startswith("error: ")
        for name in names:
            assert name in said
        assert not out.exists()
        return said

    return check


@pytest.fixture
def expert(text_recipe: Fields, tmp_path: Path) -> Path:
    """A copy of the expert `topic`, to be damaged, which the recipe names in its place."""
    fields = text_recipe["tasks"]["topic"]
    folder = shutil.copytree(fields["expert"], tmp_path / "damaged")
    fields["expert"] = str(folder)
    return folder


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_run_folder_that_cannot_be_made(text_recipe, tmp_path, capfd):
    # Before the models, which are not there, are looked for.
    text_recipe["base"] = str(tmp_path / "absent")
    recipe = write_recipe(tmp_path, text_recipe)
    status, said = failure(capfd, "learn", str(recipe), "--out", str(recipe / "run"))
    assert status == 2
    assert "recipe.yaml is a file); choose another folder" in said


def test_an_objective_that_needs_labels(text_recipe, refused):
    text_recipe["objectives"] = [{"name": "cross_entropy"}]
    refused(text_recipe, "calibration.label: is missing, and an objective needs labels")


def test_a_missing_expert(text_recipe, refused):
    text_recipe["tasks"]["topic"]["expert"] = "experts/none/here"
    refused(text_recipe, "expert 'topic'", "experts/none/here")


def test_an_expert_of_another_family(text_recipe, image_recipe, refused):
    text_recipe["tasks"]["topic"]["expert"] = image_recipe["tasks"]["shape"]["expert"]
    refused(text_recipe, "expert 'topic'", "model_type 'vit'", "'bert'")


def test_an_expert_of_another_size(text_recipe, expert, refused):
    edit_config(expert, num_attention_heads=8)
    refused(text_recipe, "expert 'topic'", "num_attention_heads 8", "has 4")


def test_a_missing_tensor(text_recipe, expert, refused):
    edit_weights(expert, lambda tensors: tensors.pop(QUERY))
    refused(text_recipe, "expert 'topic'", str(expert), f"lacks {QUERY}")


def test_an_extra_tensor(text_recipe, expert, refused):
    edit_weights(expert, lambda tensors: tensors.update({"adapter.weight": np.zeros(3)}))
    refused(text_recipe, "expert 'topic'", str(expert), "has adapter.weight")


def test_a_tensor_of_another_shape(text_recipe, expert, refused):
    def cut(tensors: dict[str, np.ndarray]) -> None:
        tensors[QUERY] = np.ascontiguousarray(tensors[QUERY][:, :5])

    edit_weights(expert, cut)
    refused(text_recipe, "expert 'topic'", QUERY, "(96, 5)", "(96, 96)")


def test_a_head_of_another_shape_than_its_config_says(text_recipe, expert, refused):
    edit_weights(expert, lambda tensors: tensors.update({"classifier.bias": np.zeros(9)}))
    refused(text_recipe, "expert 'topic'", "9 classes by classifier.bias", "3 by its config.json")


def test_an_expert_whose_config_makes_numbers_of_classes(text_recipe, expert, refused):
    edit_config(expert, problem_type="regression")
    refused(text_recipe, "preset adamerging: entropy", "'topic'", "numbers", "output_alignment")
    text_recipe["preset"] = "recommended"
    refused(text_recipe, "test data of task 'topic'", "'label'", "a list of 3 numbers")
    edit_config(expert, problem_type="multi_label_classification")
    refused(text_recipe, "test data of task 'topic'", "'label'", "a list of classes")
    edit_config(expert, problem_type=None, id2label={"0": "score"}, label2id={"score": 0})
    refused(text_recipe, "expert 'topic'", "3 classes by classifier.bias", "1 by its config.json")


@pytest.mark.parametrize(("value", "said"), [(np.nan, "1 NaN"), (-np.inf, "1 Inf")])
@pytest.mark.parametrize("tensor", [QUERY, "classifier.weight"])
def test_values_that_are_not_finite(text_recipe, expert, refused, value, said, tensor):
    edit_weights(expert, lambda tensors: tensors[tensor].__setitem__((2, 7), value))
    refused(text_recipe, "expert 'topic'", tensor, said, "[2, 7]")


def test_values_of_the_base_that_are_not_finite(text_recipe, tmp_path, refused):
    base = shutil.copytree(text_recipe["base"], tmp_path / "base")
    text_recipe["base"] = str(base)
    name = "pooler.dense.bias"
    edit_weights(base, lambda tensors: tensors[name].__setitem__(0, np.nan))
    refused(text_recipe, "base (", name, "1 NaN")


def test_a_file_that_is_cut_off(text_recipe, expert, refused):
    file = expert / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(text_recipe, "expert 'topic'", str(file), "bytes")


@pytest.mark.parametrize(
    ("shard", "said"),
    [
        ("model-00002-of-00002.safetensors", "which is missing"),
        ("../elsewhere.safetensors", "not a file in its own folder"),
    ],
)
def test_an_index_that_points_nowhere(text_recipe, expert, refused, shard, said):
    (expert / "model.safetensors").rename(expert / "model-00001-of-00002.safetensors")
    shutil.copy(
        expert / "model-00001-of-00002.safetensors", expert.parent / "elsewhere.safetensors"
    )
    names = load_file(expert / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors") | {QUERY: shard}
    (expert / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(text_recipe, "expert 'topic'", "model.safetensors.index.json", shard, said)


def test_pickled_weights_are_never_opened(text_recipe, expert, refused):
    (expert / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(expert.parent / "unpickled"),)

    torch.save(Trap(), expert / "pytorch_model.bin")
    refused(text_recipe, "expert 'topic'", "only pickled weights (pytorch_model.bin)")
    assert not (expert.parent / "unpickled").exists()


def test_empty_calibration_data(text_recipe, tmp_path, refused):
    text_recipe["tasks"]["mood"]["calibration"] = str(write_json_lines(tmp_path / "e.jsonl", []))
    refused(text_recipe, "calibration data of task 'mood'", "e.jsonl", "no examples")


def test_too_little_calibration_data(text_recipe, tmp_path, refused):
    rows = [{"text": "a b"}] * 4
    text_recipe["tasks"]["mood"]["calibration"] = str(write_json_lines(tmp_path / "e.jsonl", rows))
    refused(text_recipe, "task 'mood'", "4 example(s)", "learning.batch_size")


def test_missing_calibration_data(text_recipe, refused):
    text_recipe["tasks"]["mood"]["calibration"] = "data/none.jsonl"
    refused(text_recipe, "calibration data of task 'mood'", "no such file", "data/none.jsonl")


def test_an_unknown_recipe_field(text_recipe, tmp_path, refused):
    text_recipe["learning"]["batchsize"] = 4
    said = refused(text_recipe, "recipe.yaml", "learning.batchsize", "'batch_size'")
    assert str(tmp_path) in said


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--coefficients.initial", "1.5", "coefficients.initial: 1.5 is not from 0 to 1"),
        ("--seed", "-1", "seed: found -1"),
        ("--learning.optimizer.name", "adamm", "optax has no 'adamm'; did you mean 'adam'"),
        ("--learning.optimizer.name", "lbfgs", "optax.lbfgs asks for more than a gradient"),
        ("--learning.optimizer.options", "{learning_rate: 7}", "learning_rate is a field of its"),
    ],
)
def test_unusable_options(text_recipe, tmp_path, capfd, option, value, message):
    recipe = write_recipe(tmp_path, text_recipe)
    options = ["--out", str(tmp_path / "out"), option, value]
    status, said = failure(capfd, "learn", str(recipe), *options)
    assert status == 2
    assert message in said
    assert not (tmp_path / "out").exists()


def test_an_output_folder_in_use(text_recipe, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    recipe = write_recipe(tmp_path, text_recipe)
    status, said = failure(capfd, "learn", str(recipe), "--out", str(tmp_path / "out"))
    assert status == 2
    assert f"{tmp_path / 'out'} is not empty" in said
    assert os.listdir(tmp_path / "out") == ["mine.txt"]


def test_a_full_disk(text_recipe, refused, monkeypatch):
    usage = namedtuple("usage", "total used free")
    # Enough for one of the two checkpoints of 2 MB, not for both.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 3 * 10**6))
    text_recipe["export"] = {}
    refused(text_recipe, "not enough space", "3.9 MB will be written", "3.0 MB are free")


@pytest.mark.parametrize("part", ["test", "validation"])
def test_labels_that_the_head_does_not_have(text_recipe, tmp_path, refused, part):
    rows = [{"text": "a b", "label": label} for label in (0, 2, 3, 1)]
    file = write_json_lines(tmp_path / "labels.jsonl", rows)
    for task in text_recipe["tasks"].values():
        task[part] = {"path": task["test"]["path"], "label": "label"}
    text_recipe["tasks"]["topic"][part]["path"] = str(file)
    refused(text_recipe, f"{part} data of task 'topic'", "example 2 has label 3", "0 to 2")


def test_labels_that_zero_shot_heads_do_not_have(clip_recipe, refused):
    clip_recipe["learning"]["batch_size"] = 2
    clip_recipe["tasks"]["birds"]["class_names"] = ["crow", "owl"]
    refused(clip_recipe, "data of task 'birds'", "class 'big bird', which is none of", "crow, owl")


@pytest.mark.parametrize(
    ("edit", "names"),
    [
        ({"image_mean": [0.5]}, ["image_mean is [0.5]"]),
        ({"size": {"height": 0, "width": 8}}, ["size.height is 0"]),
        ({"size": {"height": 6, "width": 8}}, ["makes images of", "(3, 6, 8)", "(3, 8, 8)"]),
    ],
)
def test_an_image_processor_that_does_not_fit(clip_recipe, tmp_path, refused, edit, names):
    folder = shutil.copytree(clip_recipe["base"], tmp_path / "base")
    file = folder / "preprocessor_config.json"
    fields = json.loads(file.read_text()) | {"do_center_crop": False} | edit
    file.write_text(json.dumps(fields))
    clip_recipe["base"] = str(folder)
    refused(clip_recipe, f"base ({folder}): its preprocessor_config.json", *names)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "preprocessor_config.json is not JSON"),
        ('{"image_processor_type": "Unheard"}', "its preprocessor_config.json cannot be read"),
    ],
)
def test_an_image_processor_that_cannot_be_read(image_recipe, tmp_path, refused, content, message):
    folder = shutil.copytree(image_recipe["tasks"]["shape"]["expert"], tmp_path / "broken")
    (folder / "preprocessor_config.json").write_text(content)
    image_recipe["tasks"]["shape"]["expert"] = str(folder)
    refused(image_recipe, str(folder), message)


def test_test_data_without_labels(text_recipe, refused):
    del text_recipe["tasks"]["tone"]["test"]["label"]
    refused(text_recipe, "tasks.tone.test.label", "is missing")


def test_test_data_for_some_tasks_only(text_recipe, refused):
    del text_recipe["tasks"]["tone"]["test"]
    refused(text_recipe, "tasks.tone.test", "is missing", "topic")


def test_experts_that_are_the_base(text_recipe, tmp_path, refused):
    text_recipe["keep_from_base"] = ["*"]
    refused(text_recipe, "no expert differs from the base")


def test_coefficients_of_other_experts(text_recipe, tmp_path, capfd):
    file = tmp_path / "coefficients.safetensors"
    random_coefficients(open_models(parse_recipe(text_recipe), tmp_path)).save(file)
    tasks = text_recipe["tasks"]
    folder = shutil.copytree(tasks["topic"]["expert"], tmp_path / "other")
    edit_weights(folder, lambda tensors: tensors["classifier.bias"].__iadd__(1.0))

    def refused(fields: Fields) -> str:
        recipe = write_recipe(tmp_path, fields)
        options = ["--out", str(tmp_path / "out")]
        status, said = failure(capfd, "fold", str(recipe), str(file), *options)
        assert status == 2
        assert not (tmp_path / "out").exists()
        return said

    other = tasks | {"topic": tasks["topic"] | {"expert": str(folder)}}
    assert f"learned for topic = {tasks['topic']['expert']}" in refused(
        text_recipe | {"tasks": other}
    )
    without = {task: own for task, own in tasks.items() if task != "topic"}
    said = refused(text_recipe | {"tasks": without})
    assert "the recipe has no 'topic'" in said
    assert "--scale topic=0" in said
    renamed = without | {"subject": tasks["topic"]}
    assert "has no coefficients for 'subject'" in refused(text_recipe | {"tasks": renamed})


@pytest.mark.parametrize("command", ["learn", "evaluate"])
def test_no_recipe(command, capfd):
    status, said = failure(capfd, command)
    assert status == 2
    assert f"adamerge {command}: give a recipe" in said


def test_a_missing_coefficients_file(tmp_path, capfd):
    status, said = failure(capfd, "inspect", str(tmp_path / "none.safetensors"))
    assert status == 2
    assert "none.safetensors: no such file" in said


def test_evaluating_another_architecture(text_recipe, image_recipe, tmp_path, capfd):
    recipe = write_recipe(tmp_path, text_recipe)
    status, said = failure(capfd, "evaluate", str(recipe), "--checkpoint", image_recipe["base"])
    assert status == 2
    assert "checkpoint (" in said
    assert "'vit'" in said


def test_divergence_leaves_the_last_good_coefficients(image_recipe, tmp_path, capfd):
    image_recipe["coefficients"] = {"constraint": "free", "granularity": "task"}
    image_recipe["learning"]["optimizer"] = {"learning_rate": 1e12, "name": "sgd"}
    recipe = write_recipe(tmp_path, image_recipe)
    status, said = failure(capfd, "learn", str(recipe), "--out", str(tmp_path / "out"))
    assert status == 1
    assert "task 'shape': the objective" in said
    assert "keeps the last good coefficients" in said
    coefficients = Coefficients.load(tmp_path / "out" / "coefficients.safetensors")
    assert coefficients.step == 0
    np.testing.assert_array_equal(coefficients.values["all"], np.full(2, 0.3, np.float32))
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_divergence_at_the_start_keeps_nothing(image_recipe, tmp_path, capfd):
    folder = shutil.copytree(image_recipe["tasks"]["shape"]["expert"], tmp_path / "huge")
    name = "classifier.weight"
    edit_weights(folder, lambda tensors: tensors[name].__imul__(np.float32(1e38)))
    image_recipe["tasks"]["shape"]["expert"] = str(folder)
    recipe = write_recipe(tmp_path, image_recipe)
    status, said = failure(capfd, "learn", str(recipe), "--out", str(tmp_path / "out"))
    assert status == 1
    assert "step 0, task 'shape'" in said
    assert "keeps" not in said


def test_one_line_is_all_that_a_user_sees(text_recipe, expert, tmp_path):
    """In a process of its own, where no test framework catches warnings and logs."""
    edit_weights(expert, lambda tensors: tensors[QUERY].__setitem__((2, 7), np.nan))
    recipe = write_recipe(tmp_path, text_recipe)
    script = "from adamerge_jax.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "learn", str(recipe), "--out", str(tmp_path / "out")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"error: expert 'topic' ({expert}): {QUERY} holds 1 NaN")
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_stays_empty(text_recipe, tmp_path, capfd):
    """So that the recipe, once it is put right, can be started in it."""
    (tmp_path / "out").mkdir()
    text_recipe["tasks"]["topic"]["calibration"] = "none.jsonl"
    recipe = write_recipe(tmp_path, text_recipe)
    status, said = failure(capfd, "learn", str(recipe), "--out", str(tmp_path / "out"))
    assert status == 2
    assert "no such file" in said
    assert os.listdir(tmp_path / "out") == []


def test_a_run_folder_that_orbax_takes_for_a_pattern(text_recipe, tmp_path, capfd):
    recipe = write_recipe(tmp_path, text_recipe | {"export": {}})
    out = tmp_path / "run [v2]"
    status, said = failure(capfd, "learn", str(recipe), "--out", str(out))
    assert status == 2
    assert f"{out} has one of the characters * ? [ in its path" in said
    assert not out.exists()
    # Nothing but the Orbax checkpoint minds.
    cli.main(["learn", str(recipe), "--out", str(out), "--export.no-orbax"])
    assert (out / "checkpoint" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (np.full((8, 4), 30_000), "input_ids go from 30000 to 30000, the model's tokens from 0 to"),
        (np.full((8, 4), -1), "input_ids go from -1 to -1"),
        (np.ones((8, 4), np.float32), "input_ids are float32, expected whole numbers"),
        (np.ones((8, 4000), int), "texts have 4000 tokens, the model has positions for"),
    ],
)
def test_tokens_that_the_model_does_not_have(text_recipe, tmp_path, refused, ids, said):
    np.savez(tmp_path / "data.npz", input_ids=ids)
    text_recipe["tasks"]["topic"]["calibration"] = str(tmp_path / "data.npz")
    refused(text_recipe, "calibration data of task 'topic'", "data.npz", said)
