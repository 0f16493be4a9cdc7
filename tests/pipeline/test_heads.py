"""Heads of a merge: fitted or learned, exported, kept in the coefficients file, folded again."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForImageClassification

from adamerge_jax import Coefficients
from adamerge_jax.cli.main import main
from adamerge_jax.errors import InputError
from adamerge_jax.pipeline.run_evaluate import evaluate
from adamerge_jax.pipeline.workspace import open_workspace
from adamerge_jax.recipes.loading import load_recipe
from adamerge_jax.runs.results import read_results


def written(recipe: dict, folder: Path, **fields) -> Path:
    file = folder / "recipe.yaml"
    learning = {"steps": 3, "batch_size": 4, "evaluate_every": 1}
    file.write_text(yaml.safe_dump(recipe | {"learning": learning} | fields))
    return file


@pytest.fixture(scope="module")
def learned(image_fields, tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """Returns the recipe and the folder of a run with heads of a kind, which nobody changes."""

    @functools.cache
    def run(kind: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(kind)
        recipe = written(image_fields, folder, heads=kind)
        main(["learn", str(recipe), "--out", str(folder / "run")])
        return recipe, folder / "run"

    return run


@pytest.mark.parametrize("kind", ["scaled", "refitted", "learned"])
def test_heads_are_exported_and_folded_to_the_same_bytes(kind, learned, image_recipe, tmp_path):
    recipe, run = learned(kind)
    coefficients = Coefficients.load(run / "coefficients.safetensors")
    assert coefficients.heads == kind
    changed = 0
    for task, fields in image_recipe["tasks"].items():
        folder = run / "checkpoint" / "tasks" / task
        model = AutoModelForImageClassification.from_pretrained(folder)
        expert = AutoModelForImageClassification.from_pretrained(fields["expert"])
        for name, array in coefficients.head_tensors[task].items():
            np.testing.assert_array_equal(model.state_dict()[name].numpy(), array)
            changed += not np.array_equal(array, expert.state_dict()[name].numpy())
    assert changed
    file = run / "coefficients.safetensors"
    with safe_open(file, "np") as opened:  # older versions would fold it with other heads
        assert opened.metadata()["format"] == "adamerge_jax coefficients 4"
    main(["fold", str(recipe), str(file), "--out", str(tmp_path / "folded")])
    weights = sorted((run / "checkpoint").rglob("*.safetensors"))
    assert weights
    for path in weights:
        again = tmp_path / "folded" / path.relative_to(run)
        assert path.read_bytes() == again.read_bytes()


def test_the_table_has_baselines_with_fitted_heads(learned):
    recipe, run = learned("refitted")
    results = read_results(run / "results.json")
    kinds = [row.kind for row in results.rows]
    assert kinds == ["baseline", "heads", "experts", *["baseline", "heads"] * 2, "learned"]
    assert results.rows[1].method == "base, heads refitted"
    assert results.outcome.reference in {r.method for r in results.rows if r.kind == "baseline"}
    assert results.outcome.with_heads in {r.method for r in results.rows if r.kind == "heads"}
    checkpoint = str(run / "checkpoint")
    row = evaluate(load_recipe(recipe), checkpoint, root=Path("/"), console=Console(quiet=True))
    assert row.tasks == results.rows[-1].tasks


def test_a_refitted_head_is_nearer_to_its_expert(learned, image_recipe):
    distances = {}
    for kind in ("kept", "refitted"):
        _, run = learned(kind)
        distances[kind] = 0.0
        for task, fields in image_recipe["tasks"].items():
            folder = run / "checkpoint" / "tasks" / task
            merged = AutoModelForImageClassification.from_pretrained(folder)
            expert = AutoModelForImageClassification.from_pretrained(fields["expert"])
            pixels = torch.from_numpy(np.load(fields["calibration"])["pixel_values"])
            with torch.no_grad():
                log_merged = merged(pixels).logits.log_softmax(-1)
                wanted = expert(pixels).logits.softmax(-1)
            divergence = torch.nn.functional.kl_div(log_merged, wanted, reduction="batchmean")
            distances[kind] += float(divergence)
    assert distances["refitted"] < distances["kept"]


def test_resumed_learning_has_the_same_heads(learned, tmp_path):
    recipe, whole = learned("learned")
    resumed = shutil.copytree(whole, tmp_path / "run")
    (resumed / "results.json").unlink()
    main(["learn", str(recipe), "--out", str(resumed), "--resume"])
    files = [folder / "coefficients.safetensors" for folder in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_zero_shot_heads_are_scaled(clip_recipe, tmp_path):
    recipe = written(clip_recipe, tmp_path, heads="scaled")
    main(["learn", str(recipe), "--out", str(tmp_path / "run")])
    coefficients = Coefficients.load(tmp_path / "run" / "coefficients.safetensors")
    stored = load_file(tmp_path / "run" / "checkpoint" / "zero_shot_heads.safetensors")
    for task, head in coefficients.head_tensors.items():
        for name, array in head.items():
            np.testing.assert_array_equal(stored[f"{task}.{name}"], array)
    for name in stored:
        if name.endswith(".bias"):
            stored[name][:] = np.where(np.arange(len(stored[name])) == 0, 1000, 0)
    checkpoint = tmp_path / "run" / "checkpoint"
    save_file(stored, checkpoint / "zero_shot_heads.safetensors")
    fields = load_recipe(recipe)
    row = evaluate(fields, str(checkpoint), root=tmp_path, console=Console(quiet=True))
    labels = {t: data.labels for t, data in open_workspace(fields, tmp_path).data.test.items()}
    assert row.tasks == pytest.approx({t: (of == 0).mean() for t, of in labels.items()})


@pytest.mark.parametrize("kind", ["refitted", "learned"])
def test_zero_shot_heads_are_not_turned(kind, clip_recipe, tmp_path, capsys):
    recipe = written(clip_recipe, tmp_path, heads=kind)
    with pytest.raises(SystemExit) as exit:
        main(["learn", str(recipe), "--out", str(tmp_path / "run")])
    assert exit.value.code == 2
    assert "choose scaled or kept" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_heads_of_another_expert_are_refused(learned, tmp_path):
    recipe, run = learned("refitted")
    file = run / "coefficients.safetensors"
    arrays = load_file(file)
    coefficients = Coefficients.load(file)
    (key, *_) = [name for name in arrays if name.startswith("heads/")]
    for replacement, message in (
        (np.zeros((1, 1), np.float32), "does not have"),
        (np.full_like(arrays[key], np.nan), "not finite"),
        (arrays[key].astype(np.float16), "expected a float32"),
    ):
        with safe_open(file, "np") as opened:
            metadata = opened.metadata()
        damaged = tmp_path / "damaged.safetensors"
        save_file({**arrays, key: replacement}, damaged, metadata)
        with pytest.raises((InputError, SystemExit)):
            main(["fold", str(recipe), str(damaged), "--out", str(tmp_path / "folded")])
        assert not (tmp_path / "folded").exists(), message
    assert coefficients.heads == "refitted"
