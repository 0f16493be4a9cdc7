"""Coefficients folded again: other factors, fewer experts, another order, other models."""

import dataclasses
import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console
from transformers import AutoModel, AutoModelForSequenceClassification

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.cli import main as cli
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.errors import InputError
from adamerge_jax.interference import FittedStep
from adamerge_jax.pipeline import run as jobs
from adamerge_jax.pipeline.fold import fold
from adamerge_jax.pipeline.match import parse_scale, prepare_fold
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.recipes.loading import parse_recipe
from tests.adapter_references import save_experts
from tests.references import edit_weights, random_coefficients, write_recipe


def models_of(fields, tasks=None):
    chosen = {task: fields["tasks"][task] for task in tasks or fields["tasks"]}
    return open_models(parse_recipe(fields | {"tasks": chosen}), Path("/"))


@pytest.fixture(scope="module")
def file(text_fields, tmp_path_factory) -> Path:
    """Coefficients of all three experts, one per row."""
    path = tmp_path_factory.mktemp("learned") / "coefficients.safetensors"
    random_coefficients(models_of(text_fields), "row").save(path)
    return path


@pytest.fixture(scope="module")
def reference(text_fields, file) -> dict[str, np.ndarray]:
    """The merge with `tone` halved and `topic` left out, summed in NumPy."""
    coefficients, models = Coefficients.load(file), models_of(text_fields)
    merged = {}
    for name in models.base.names:
        merged[name] = models.base.read(name).astype(np.float64)
        if name not in coefficients.values:
            continue
        for factor, expert, scale in zip(
            (0.5, 0, 1), models.experts.values(), coefficients.values[name], strict=True
        ):
            tau = expert.read(name).astype(np.float64) - models.base.read(name)
            scale = scale.reshape(-1, *(1 for _ in tau.shape[1:])) if scale.ndim else scale
            merged[name] += factor * scale * tau
    return merged


@pytest.mark.parametrize("tasks", [["tone", "topic", "mood"], ["mood", "tone"]])
def test_experts_are_found_in_any_order_and_left_out(text_fields, file, reference, tasks):
    found = prepare_fold(file, models_of(text_fields, tasks), scale={"tone": 0.5, "topic": 0})
    assert list(found.models.experts) == ["tone", "mood"] == list(found.coefficients.names)
    assert [source.name for source in found.models.sources] == ["base", "tone", "mood"]
    assert found.coefficients.scaled == {"tone": 0.5}
    assert found.notes == ()
    for name, array in fold(found.models, found.coefficients):
        np.testing.assert_allclose(array, reference[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_command_scales_and_says_so(text_fields, file, reference, tmp_path, capsys):
    recipe, out = write_recipe(tmp_path, text_fields), tmp_path / "out"
    options = ["--out", str(out), "--scale", "tone=0.5", "topic=0"]
    cli.main(["fold", str(recipe), str(file), *options])
    checkpoint = Checkpoint.open(out / "checkpoint")
    for name, array in reference.items():
        np.testing.assert_allclose(checkpoint.read(name), array, rtol=1e-5, atol=1e-6)
    assert sorted(task.name for task in (out / "checkpoint/tasks").iterdir()) == ["mood", "tone"]
    card = (out / "checkpoint/README.md").read_text()
    assert "multiplied after learning: tone times 0.5." in card
    assert "topic" not in card
    # What was folded can be folded again, now without any factor.
    again = prepare_fold(out / "coefficients.safetensors", models_of(text_fields, ["tone", "mood"]))
    np.testing.assert_array_equal(
        again.coefficients.values["bert.pooler.dense.weight"],
        Coefficients.load(file).times({"tone": 0.5}).values["bert.pooler.dense.weight"][[0, 2]],
    )
    cli.main(["inspect", str(out / "coefficients.safetensors")])
    assert "tone times 0.5" in capsys.readouterr().out


def test_the_card_of_a_fold_with_interference_names_the_models_that_are_there(
    text_fields, tmp_path
):
    steps = [FittedStep("trim", {"density": 0.5}), FittedStep("elect_sign", {})]
    path, out = tmp_path / "steps.safetensors", tmp_path / "out"
    random_coefficients(models_of(text_fields), interference=steps).save(path)
    recipe = write_recipe(tmp_path, text_fields)
    cli.main(["fold", str(recipe), str(path), "--out", str(out), "--scale", "tone=0"])
    card = (out / "checkpoint/README.md").read_text()
    assert "tasks/topic" in card
    assert "tasks/tone" not in card
    assert not (out / "checkpoint/tasks/tone").exists()


def test_the_file_says_what_is_mixed(text_fields, file, tmp_path, capsys):
    """Not what the recipe's preset keeps from the base, but what its own patterns keep."""
    recipe = write_recipe(tmp_path, text_fields | {"preset": "expert-merging"})
    models = models_of(text_fields)
    merged = dict(fold(models, Coefficients.load(file)))
    pattern = "*.attention.self.*"

    def kept(*options: str) -> set[str]:
        """The mixed tensors that a fold leaves at the base's."""
        out = tmp_path / f"out {len(options)}"
        cli.main(["fold", str(recipe), str(file), "--out", str(out), *options])
        checkpoint = Checkpoint.open(out / "checkpoint")
        different = {n for n in merged if (checkpoint.read(n) != merged[n]).any()}
        for name in different:
            np.testing.assert_array_equal(checkpoint.read(name), models.base.read(name))
        return different

    assert kept() == set()
    assert "note" not in capsys.readouterr().out
    found = kept("--keep-from-base", pattern)
    assert found == {n for n in Coefficients.load(file).shapes if fnmatchcase(n, pattern)}
    assert f"{len(found)} of the " in (printed := capsys.readouterr().out)
    assert "stay the base's, such as bert.encoder.layer.0.attention.self." in printed


@pytest.mark.parametrize("granularity", ["row", "chunk"])
def test_float32_keeps_the_sums_of_bfloat16_models(text_recipe, tmp_path, granularity):
    AutoModel.from_pretrained(text_recipe["base"]).bfloat16().save_pretrained(tmp_path / "base")
    fields = text_recipe | {"base": str(tmp_path / "base")}
    for task, own in fields["tasks"].items():
        model = AutoModelForSequenceClassification.from_pretrained(own["expert"]).bfloat16()
        model.save_pretrained(tmp_path / task)
        own["expert"] = str(tmp_path / task)
    models = models_of(fields)
    options = {"pieces": 3} if granularity == "chunk" else {}
    coefficients = random_coefficients(models, granularity, **options)
    wide = dict(fold(models, coefficients, np.dtype(np.float32)))
    rounded = 0
    for name, array in fold(models, coefficients):
        assert array.dtype == ml_dtypes.bfloat16
        if name in coefficients.shapes:
            assert wide[name].dtype == np.float32
            rounded += (wide[name] != array).sum()
        np.testing.assert_array_equal(wide[name].astype(ml_dtypes.bfloat16), array)
    assert rounded > 1000


def test_a_home_folder_that_no_shell_has_filled_in(text_fields, file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = write_recipe(tmp_path, text_fields)
    cli.main(["fold", str(recipe), str(file), "--out=~/out", "--scale", "tone=0"])
    found = {entry.name for entry in (tmp_path / "out").iterdir()}
    assert found == {"checkpoint", "coefficients.safetensors"}


def test_factors_are_read():
    with pytest.raises(InputError, match="found 'tone'; expected an expert and a factor"):
        parse_scale(("tone",))
    with pytest.raises(InputError, match="found '=2'"):
        parse_scale(("=2",))
    with pytest.raises(InputError, match="'a' is given twice"):
        parse_scale(("a=1", "a=2"))
    assert parse_scale(("tone=0.5", "a=b=-2")) == {"tone": 0.5, "a=b": -2}


def test_factors_that_make_no_sense(text_fields, file):
    coefficients = Coefficients.load(file)
    assert coefficients.times({"tone": 0.5}).times({"tone": 0.5}).scaled == {"tone": 0.25}
    for scale, message in (
        ({"tune": 1.0}, "there is no expert 'tune'; the experts are tone, topic, mood"),
        ({"tone": float("nan")}, "the factor of 'tone' is nan"),
        ({"tone": 0.0, "topic": 0.0, "mood": 0.0}, "every expert is left out"),
    ):
        with pytest.raises(InputError, match=message):
            coefficients.times(scale)


def test_interference_steps_need_every_expert(text_fields, file, tmp_path):
    models = models_of(text_fields)
    path = tmp_path / "steps.safetensors"
    steps = [FittedStep("trim", {"density": 0.5}), FittedStep("elect_sign", {})]
    random_coefficients(models, interference=steps).save(path)
    with pytest.raises(InputError, match="interference steps need every expert"):
        prepare_fold(path, models_of(text_fields, ["tone", "mood"]), scale={"topic": 0})
    reordered = models_of(text_fields, ["mood", "topic", "tone"])
    found = prepare_fold(path, reordered, scale={"topic": 0})
    assert found.coefficients.left_out == {"topic"}
    in_order = fold(models, Coefficients.load(path).times({"topic": 0}))
    for (name, array), (_, expected) in zip(
        fold(found.models, found.coefficients), in_order, strict=True
    ):
        np.testing.assert_array_equal(array, expected, err_msg=name)


def test_other_models_are_refused_unless_told_to_go_on(text_fields, file, tmp_path):
    topic = text_fields["tasks"]["topic"]
    folder = shutil.copytree(topic["expert"], tmp_path / "newer")
    edit_weights(folder, lambda tensors: tensors["classifier.bias"].__iadd__(1.0))
    tasks = text_fields["tasks"] | {"topic": topic | {"expert": str(folder)}}
    models = models_of(text_fields | {"tasks": tasks})
    with pytest.raises(InputError, match="--allow-other-models folds all the same") as caught:
        prepare_fold(file, models)
    assert f"learned for topic = {topic['expert']}" in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "base" not in str(caught.value).replace(str(folder), "")
    (note,) = prepare_fold(file, models, allow_other_models=True).notes
    assert "topic" in note


def test_an_expert_under_another_name(text_fields, file):
    tasks = dict(text_fields["tasks"])
    tasks["subject"] = tasks.pop("topic")
    renamed = models_of(text_fields | {"tasks": tasks})
    with pytest.raises(InputError, match="has no coefficients for 'subject'"):
        prepare_fold(file, renamed)


def test_a_base_of_another_shape(text_fields, file, tmp_path):
    coefficients = Coefficients.load(file)
    shapes = dict(coefficients.shapes) | {"bert.pooler.dense.weight": (96, 64)}
    other = dataclasses.replace(coefficients, shapes=shapes)
    with pytest.raises(InputError, match=r"of shape \(96, 64\), the base's .* has \(96, 96\)"):
        list(fold(models_of(text_fields), other))
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="only as a starting point"):
        prepare_fold(tmp_path / "other.safetensors", models_of(text_fields))


def test_matrices_that_only_an_expert_that_is_left_out_changed(tmp_path):
    options = dict(r=2, lora_alpha=4)
    adapters = {
        "every": options | {"target_modules": "all-linear"},
        "queries": options | {"target_modules": r".*q_proj"},
    }
    fields, _ = save_experts("llama", tmp_path, adapters)
    fields |= {"preset": "adamerging", "export": {"adapter": True}}
    models = models_of(fields)
    coefficients = random_coefficients(models, "row")
    coefficients.save(tmp_path / "coefficients.safetensors")
    jobs.fold_file(
        tmp_path / "coefficients.safetensors",
        parse_recipe(fields),
        root=Path("/"),
        out=tmp_path / "out",
        console=Console(quiet=True),
        scale={"every": 0},
    )
    checkpoint = Checkpoint.open(tmp_path / "out" / "checkpoint")
    for name in models.base.names:
        expected = models.base.read(name)
        if "q_proj" in name:
            left, right, _ = models.experts["queries"].low_rank(name)
            expected = expected + coefficients.values[name][1][:, None] * (left @ right)
        np.testing.assert_allclose(checkpoint.read(name), expected, rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 2
    assert all("q_proj" in module for module in config["target_modules"])
