"""A recipe is run and prepared from Python by public names."""

from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest

import adamerge_jax as am
from adamerge_jax.learning.loop import Progress
from tests.references import write_recipe


@pytest.fixture(scope="module")
def prepared(image_fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> am.Prepared:
    file = write_recipe(tmp_path_factory.mktemp("prepared"), image_fields)
    recipe = am.load_recipe(file, changes={"coefficients": {"granularity": "tensor"}})
    return am.prepare(recipe, progress=False)


@pytest.fixture(scope="module")
def steps() -> list[Progress]:
    return []


@pytest.fixture(scope="module")
def merge(prepared: am.Prepared, steps: list[Progress]) -> am.MergeResult:
    return prepared.learn(on_step=steps.append)


def test_it_learns_as_a_run_does(
    prepared: am.Prepared, merge: am.MergeResult, tmp_path: Path, capsys
):
    run = am.run_recipe(prepared.recipe, tmp_path / "run", progress=False)
    assert capsys.readouterr().out == ""
    assert run.folder == tmp_path / "run"
    for group, values in merge.coefficients.values.items():
        np.testing.assert_array_equal(values, run.coefficients.values[group])
    assert run.rows[-1].tasks == prepared.evaluate(merge).tasks
    assert run.table is not None
    assert [str(column.header) for column in run.table.columns][1:-1] == list(prepared.recipe.tasks)
    with pytest.raises(am.InputError, match="run"):
        am.run_recipe(prepared.recipe, tmp_path / "run", progress=False)


def test_every_step_is_told(prepared: am.Prepared, merge: am.MergeResult, steps: list[Progress]):
    count = prepared.recipe.learning.steps
    assert [progress.step for progress in steps] == list(range(count + 1))
    best = [progress.best for progress in steps if progress.best is not None][-1]
    for group, values in best.values.items():
        np.testing.assert_array_equal(values, merge.values[group])


def test_a_loop_of_ones_own(prepared: am.Prepared):
    granularity = am.granularities.task(prepared.shapes)
    learner = am.make_learner(
        prepared.forward,
        granularity,
        am.CONSTRAINTS["free"],
        am.objectives.entropy(),
        optax.adam(0.1),
    )
    start = am.granularities.constant(prepared.shapes, len(prepared.experts), value=0.3)
    learned = am.learn(
        learner,
        prepared.frozen,
        granularity.init(start),
        prepared.calibration,
        steps=1,
        evaluate_every=1,
    )
    merged = am.materialize(
        am.mix(prepared.base, prepared.deltas, granularity.scales(learned.values))
    )
    row = prepared.evaluate(merged, "mine")
    assert row.method == "mine"
    assert list(row.tasks) == prepared.experts


def test_an_expert_at_0_is_left_out(prepared: am.Prepared, merge: am.MergeResult):
    first, second = prepared.experts
    without = merge.times({first: 0.0})
    assert without.heads == merge.heads
    for group, values in without.values.items():
        assert not np.any(values[:, 0])
        np.testing.assert_array_equal(values[:, 1], merge.values[group][:, 1])
    nothing = without.times({second: 1e-30}).parameters(prepared.base)
    for name, parameter in nothing.items():
        np.testing.assert_array_equal(parameter, prepared.base[name])
    with pytest.raises(am.InputError, match="tune"):
        merge.times({"tune": 0.5})


def test_the_rows_that_a_merge_is_compared_with(prepared: am.Prepared):
    baselines = prepared.baselines()
    assert {"base", "experts (one model each)", "average"} <= set(baselines)
    assert baselines["experts (one model each)"].average == 1.0  # labels are theirs


def test_cosines_of_task_vectors(prepared: am.Prepared, merge: am.MergeResult):
    cosines = prepared.cosines()
    assert set(cosines) == set(merge.coefficients.per_tensor())
    for matrix in cosines.values():
        np.testing.assert_allclose(np.diag(matrix), 1, rtol=1e-5)
        np.testing.assert_allclose(matrix, matrix.T)


def test_what_shows_coefficients(merge: am.MergeResult):
    layers, means = am.layer_means(merge.coefficients)
    assert means.shape == (len(layers), 2)
    assert am.coefficients_figure(merge.coefficients).axes
    (first, _) = am.compare(merge.coefficients, merge.times({"colour": 2.0}).coefficients).experts
    assert first.name == merge.coefficients.names[0]


def test_a_recipe_without_test_data_has_no_scores(image_recipe: dict[str, Any], tmp_path: Path):
    for task in image_recipe["tasks"].values():
        del task["test"]
    prepared = am.prepare(am.load_recipe(write_recipe(tmp_path, image_recipe)), progress=False)
    for scores in (prepared.baselines, lambda: prepared.evaluate(prepared.base)):
        with pytest.raises(am.InputError, match="no test data"):
            scores()
