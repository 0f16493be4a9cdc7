"""Each merge method against its paper's formula in float64, by itself and as an exported model."""

import weakref
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from rich.console import Console
from safetensors.numpy import load_file

from adamerge_jax import extension
from adamerge_jax.cli.main import main
from adamerge_jax.errors import InputError
from adamerge_jax.files.json_object import read_object
from adamerge_jax.interference import fit_steps
from adamerge_jax.methods import METHODS, MergeMethod, make_method, merged_parameters
from adamerge_jax.pipeline.initial_merge import fit_initial_merge
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.pipeline.read import load_task_vectors
from adamerge_jax.pipeline.run_evaluate import evaluate
from adamerge_jax.recipes.loading import load_recipe
from adamerge_jax.registry import allow_code
from adamerge_jax.task_vectors import DenseDelta
from adamerge_jax.task_vectors.offload.memory import HostMemory
from tests.methods import test_spectral
from tests.methods.data_formulas import DATA_CASES
from tests.methods.step_formulas import STEP_CASES

EXPERTS = 3


def sum_of(deltas: np.ndarray, coefficient: float) -> np.ndarray:
    return coefficient * deltas.sum(0)


def mean_of(deltas: np.ndarray) -> np.ndarray:
    return deltas.mean(0)


def ties_of(deltas: np.ndarray, coefficient: float, density: float) -> np.ndarray:
    """TIES of one tensor, `[K, *shape]`: trim, elect, disjoint mean (Yadav et al., section 4)."""
    trimmed = np.zeros_like(deltas)
    for row, delta in zip(trimmed, deltas, strict=True):
        count = int(density * delta.size) + 1  # as the authors' code counts
        largest = np.argsort(-np.abs(delta).ravel(), kind="stable")[:count]
        row.ravel()[largest] = delta.ravel()[largest]
    sign = np.sign(trimmed.sum(0))
    agreeing = np.where(np.sign(trimmed) == sign, trimmed, 0)
    return coefficient * agreeing.sum(0) / np.maximum((agreeing != 0).sum(0), 1)


CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "average": ({}, mean_of),
    "task_arithmetic": ({"coefficient": 0.4}, lambda deltas: sum_of(deltas, 0.4)),
    "ties": ({"coefficient": 0.7, "density": 0.25}, lambda deltas: ties_of(deltas, 0.7, 0.25)),
    **STEP_CASES,
}


def test_every_method_has_a_case():
    spectral = {name for name, _, _ in test_spectral.CASES.values()} | {"lora_lego"}
    from_data = {name for name, _, _ in DATA_CASES}
    assert CASES.keys() | spectral | from_data == METHODS.keys()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stacked", [False, True])
def test_the_formula(name, stacked):
    options, formula = CASES[name]
    parameter = "layer.*.weight" if stacked else "weight"
    lead = (2,) if stacked else ()
    generator = np.random.default_rng(0)
    base = generator.normal(size=(*lead, 4, 6))
    deltas = generator.normal(size=(*lead, EXPERTS, 4, 6))
    method = make_method(name, options)
    prepared = deltas.astype(np.float32)
    layers = prepared if stacked else prepared[None]
    for layer in layers:  # thresholds of one tensor, as the reference's
        fit_steps(method.interference, {"weight": layer})
    merged = merged_parameters(
        method,
        {parameter: jnp.asarray(base, jnp.float32), "other": jnp.ones(2)},
        {parameter: DenseDelta(jnp.asarray(prepared))},
        EXPERTS,
    )
    rows = zip(base, deltas, strict=True) if stacked else [(base, deltas)]
    expected = np.stack([start + formula(delta) for start, delta in rows])
    np.testing.assert_allclose(
        np.asarray(merged[parameter]).reshape(expected.shape), expected, atol=1e-5
    )
    assert merged["other"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["average", "task_arithmetic"])
def test_the_exported_model(name, image_recipe, tmp_path):
    options, formula = CASES[name]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(image_recipe))
    command = ["merge", str(recipe), "--method", name, "--options", yaml.safe_dump(options)]
    main([*command, "--out", str(tmp_path / "merged")])
    base, *experts = (
        load_file(Path(folder) / "model.safetensors")
        for folder in (
            image_recipe["base"],
            *(task["expert"] for task in image_recipe["tasks"].values()),
        )
    )
    merged = load_file(tmp_path / "merged" / "checkpoint" / "model.safetensors")
    changed = 0
    for tensor, values in merged.items():
        start = base[tensor.removeprefix("vit.")].astype(np.float64)
        others = [expert[tensor].astype(np.float64) - start for expert in experts]
        np.testing.assert_allclose(values, start + formula(np.stack(others)), atol=1e-5)
        changed += np.any(values != start)
    assert changed > 10
    card = (tmp_path / "merged" / "checkpoint" / "README.md").read_text()
    assert f"By the method {name}" in card


def test_a_method_with_interference_steps_is_exported(image_recipe, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(image_recipe | {"export": {}}))
    main(["merge", str(recipe), "--method", "ties", "--out", str(tmp_path / "merged")])
    assert (tmp_path / "merged" / "checkpoint" / "model.safetensors").is_file()
    assert (tmp_path / "merged" / "orbax").is_dir()


@extension
def keep_first() -> MergeMethod:
    """A method of one's own: the first expert, computed as an array rather than as a mixture."""
    return MergeMethod(
        lambda base, deltas, experts: {
            name: base[name] + deltas[name].weighted_sum(jnp.eye(experts)[0][:, None, None])
            if base[name].ndim == 2
            else base[name]
            for name in deltas
        }
    )


def test_a_method_of_ones_own():
    allow_code(["tests.methods.test_methods:keep_first"])
    method = make_method("tests.methods.test_methods:keep_first", {})
    base = {"weight": jnp.zeros((2, 2))}
    deltas = {"weight": DenseDelta(jnp.arange(8.0).reshape(2, 2, 2))}
    assert merged_parameters(method, base, deltas, 2)["weight"].tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tise", {}, "nearest is 'ties'"),
        ("ties", {"densty": 1}, "its options are coefficient, density"),
    ],
)
def test_what_is_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        make_method(name, options)


def test_task_vectors_are_not_kept_after_steps_are_fitted(image_recipe, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(image_recipe))
    entries = []

    def load(*arguments: Any) -> Any:
        deltas, mixed, steps = load_task_vectors(*arguments)
        entries.extend(weakref.ref(delta.values) for delta in deltas.values())
        return deltas, mixed, steps

    monkeypatch.setattr("adamerge_jax.pipeline.initial_merge.load_task_vectors", load)
    fit_initial_merge(open_models(load_recipe(recipe), tmp_path), "ties", {})
    assert entries
    assert not any(entry() is not None for entry in entries)


def test_an_adapter_is_refused_before_anything_is_written(image_recipe, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(image_recipe | {"export": {"adapter": True}}))
    with pytest.raises(SystemExit) as exit_:
        main(["merge", str(recipe), "--method", "average", "--out", str(tmp_path / "merged")])
    assert exit_.value.code == 2
    assert "a merge method without coefficients gives no factors" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_methods_have_rows_in_the_table(image_recipe, tmp_path, capsys, monkeypatch):
    """A row says of a method what `evaluate` says of its exported merge."""
    memories = []

    def load(models: Any, dtype: Any, steps: Any, memory: Any) -> Any:
        memories.append(memory)
        return load_task_vectors(models, dtype, steps, memory)

    monkeypatch.setattr("adamerge_jax.pipeline.baselines.load_task_vectors", load)
    recipe = tmp_path / "recipe.yaml"
    methods = [{"name": "ties", "options": {"density": 0.5}}]
    fields = image_recipe | {"evaluation": {"methods": methods}, "task_vectors": {"memory": "host"}}
    recipe.write_text(yaml.safe_dump(fields | {"learning": {"steps": 1, "batch_size": 2}}))
    main(["learn", str(recipe), "--out", str(tmp_path / "run")])
    assert [type(memory) for memory in memories] == [HostMemory]
    rows = {row["method"]: row for row in read_object(tmp_path / "run" / "results.json")["rows"]}
    main(
        [
            "merge",
            str(recipe),
            "--method",
            "ties",
            "--options",
            "{density: 0.5}",
            "--out",
            str(tmp_path / "ties"),
        ]
    )
    checkpoint = str(tmp_path / "ties" / "checkpoint")
    expected = evaluate(load_recipe(recipe), checkpoint, root=tmp_path, console=Console(quiet=True))
    assert rows["ties (density 0.5)"]["tasks"] == expected.tasks
    assert "ties (density 0.5)" in capsys.readouterr().out
