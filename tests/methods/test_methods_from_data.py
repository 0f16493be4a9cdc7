"""Merge methods from calibration data: their formulas in float64, and the ways they are used."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import yaml
from rich.console import Console
from safetensors.numpy import load_file

from adamerge_jax.cli.main import main
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.files.json_object import read_object
from adamerge_jax.methods import METHODS, fisher, make_method, merged_parameters, regmean
from adamerge_jax.methods.least_squares import solve_symmetric
from adamerge_jax.pipeline.run_evaluate import evaluate
from adamerge_jax.recipes.loading import load_recipe
from tests.methods.data_formulas import DATA_CASES
from tests.methods.tiny_network import EXPERTS, NORM, NORM_BIAS, SHAPES, UP, Problem


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem()


def test_every_method_that_needs_data_has_a_case():
    needing = {name for name in METHODS if make_method(name, {}).needs_data}
    assert needing == {name for name, _, _ in DATA_CASES}


@pytest.mark.parametrize(("name", "options", "formula"), DATA_CASES)
def test_the_formula(name: str, options: dict[str, Any], formula: Callable, problem: Problem):
    parts = []
    merged = merged_parameters(
        make_method(name, options),
        problem.base_arrays,
        problem.deltas,
        EXPERTS,
        problem.statistics(parts.append),
    )
    expected = formula(problem, **options)
    for parameter in SHAPES:
        np.testing.assert_allclose(
            merged[parameter], expected[parameter], atol=1e-5, err_msg=parameter
        )
    assert parts == sorted(parts)  # the progress that is shown
    assert parts[-1] == 1


def test_regmean_is_the_same_in_small_chunks(problem: Problem, monkeypatch: pytest.MonkeyPatch):
    def merged() -> dict[str, Any]:
        return merged_parameters(
            regmean(), problem.base_arrays, problem.deltas, EXPERTS, problem.statistics()
        )

    whole = merged()
    monkeypatch.setattr("adamerge_jax.methods.least_squares.GRAM_BYTES", 4 * 60)
    for parameter, values in merged().items():
        np.testing.assert_allclose(values, whole[parameter], atol=1e-6)


def test_fisher_is_the_same_in_small_chunks(problem: Problem, monkeypatch: pytest.MonkeyPatch):
    def merged() -> dict[str, Any]:
        return merged_parameters(
            fisher(samples=3), problem.base_arrays, problem.deltas, EXPERTS, problem.statistics()
        )

    whole = merged()
    monkeypatch.setattr(sys.modules["adamerge_jax.methods.fisher"], "FISHER_BYTES", 4 * 20)
    for parameter, values in merged().items():
        np.testing.assert_allclose(values, whole[parameter], atol=1e-6)


def test_inputs_that_are_always_zero_leave_the_average():
    changed = Problem()
    for parameters in (changed.base, *changed.experts):
        parameters[NORM][:, 2] = parameters[NORM_BIAS][:, 2] = 0
    merged = merged_parameters(
        regmean(1.0), changed.base_arrays, changed.deltas, EXPERTS, changed.statistics()
    )
    assert np.isfinite(merged[UP]).all()
    np.testing.assert_allclose(merged[UP][..., 2], changed.average[UP][..., 2], atol=1e-5)


def test_fewer_inputs_than_features_leave_the_rest_at_the_average():
    generator = np.random.default_rng(0)
    x, product = generator.normal(size=(3, 6)), generator.normal(size=(4, 6))
    gram = x.T @ x
    solution = solve_symmetric(gram, product @ gram)
    np.testing.assert_allclose(solution @ gram, product @ gram, atol=1e-8)
    scaled = solution * np.sqrt(np.diag(gram))
    beside = scipy.linalg.null_space(x / np.sqrt(np.diag(gram)))
    np.testing.assert_allclose(scaled @ beside, 0, atol=1e-8)


def test_without_data_it_is_refused(problem: Problem):
    with pytest.raises(ValueError, match="needs calibration data"):
        merged_parameters(regmean(), problem.base_arrays, problem.deltas, EXPERTS)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("regmean", {"off_diagonal": 1.5}, "expected from 0 to 1"),
        ("regmean_plus_plus", {"off_diagonal": -0.1}, "expected from 0 to 1"),
        ("featcal", {"ridge": -1.0}, "ridge is -1.0, expected from 0"),
        ("featcal", {"interpolation": 1.2}, "expected from 0 to 1"),
        ("fisher", {"samples": -1}, "expected 0 or more"),
        ("metrics_weighted", {"penalty": -1}, "expected from 0 to 100"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], message: str):
    with pytest.raises(Exception, match=message):
        make_method(name, options)


def test_the_command_a_row_of_the_table_and_a_start_are_one_merge(
    image_recipe: dict[str, Any], tmp_path: Path
):
    start = {"initial_merge": {"name": "regmean"}, "constraint": "free"}
    fields = image_recipe | {
        "coefficients": start,
        "evaluation": {"methods": [{"name": "regmean"}]},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(fields | {"learning": {"steps": 1, "batch_size": 2}}))
    main(["learn", str(recipe), "--out", str(tmp_path / "run")])
    rows = {row["method"]: row for row in read_object(tmp_path / "run" / "results.json")["rows"]}
    main(["merge", str(recipe), "--method", "regmean", "--out", str(tmp_path / "merged")])
    checkpoint = tmp_path / "merged" / "checkpoint"
    exported = evaluate(
        load_recipe(recipe), str(checkpoint), root=tmp_path, console=Console(quiet=True)
    )
    assert rows["regmean"]["tasks"] == exported.tasks
    tensors, base = (
        load_file(Path(folder) / "model.safetensors") for folder in (checkpoint, fields["base"])
    )
    changed = [n for n, values in tensors.items() if np.any(values != base[n.removeprefix("vit.")])]
    assert len(changed) > 10
    files = (tmp_path / folder / "coefficients.safetensors" for folder in ("merged", "run"))
    stored, of_start = (Coefficients.load(file).initial_tensors for file in files)
    assert stored.keys() >= of_start.keys() == set(changed)
    for name, values in of_start.items():
        np.testing.assert_array_equal(values, tensors[name])
        np.testing.assert_array_equal(values, stored[name])


def test_data_that_is_not_there_is_refused_before_anything_is_written(
    image_recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture
):
    image_recipe["tasks"]["shape"]["calibration"] = "missing.npz"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(image_recipe))
    with pytest.raises(SystemExit) as exit_:
        main(["merge", str(recipe), "--method", "regmean", "--out", str(tmp_path / "merged")])
    assert exit_.value.code == 2
    assert "missing.npz" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
