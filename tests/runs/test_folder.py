import json

import pytest
import yaml

from adamerge_jax.errors import InputError
from adamerge_jax.runs.folder import SavedRun
from tests.report.saved_runs import ALL, STEPS, TASKS, step, write_run, write_steps


def test_a_finished_run(tmp_path):
    run = SavedRun.open(write_run(tmp_path, *ALL))
    assert run.tasks == list(TASKS)
    assert [record.step for record in run.stages[0]] == [0, 1, 2, 3, 4]
    assert run.best.step == 2
    assert run.best.agreement == {"cat": 0.75, "dog": 0.75}
    assert run.rows[-1].average == pytest.approx(0.7)
    assert run.record["device"] == "1 x cpu (cpu)"


def test_a_run_that_has_just_begun(tmp_path):
    run = SavedRun.open(write_run(tmp_path))
    assert (run.stages, run.coefficients, run.rows, run.record) == ([], None, [], {})
    assert run.best is None


def test_coarse_coefficients_are_a_stage_of_their_own(tmp_path):
    chosen = {"granularity": "row", "coarse": {"granularity": "tensor", "steps": 2}}
    write_run(tmp_path, "coefficients", coefficients=chosen)
    write_steps(tmp_path, [*STEPS[:3], step(0, (1.0, 0.5)), step(1)])
    run = SavedRun.open(tmp_path)
    assert [[record.step for record in stage] for stage in run.stages] == [[0, 1, 2], [0, 1]]
    # The file holds one coefficient per tensor: those by row are not there yet.
    assert run.best is None


def test_the_coefficients_after_a_coarse_stage_are_the_best_of_a_run(tmp_path):
    chosen = {"granularity": "auto", "coarse": {"granularity": "layer", "steps": 2}}
    write_run(tmp_path, *ALL, coefficients=chosen)
    write_steps(tmp_path, [*STEPS[:3], *STEPS])
    assert SavedRun.open(tmp_path).best.step == 2


def test_steps_that_were_done_again_count_once(tmp_path):
    write_run(tmp_path)
    write_steps(tmp_path, [*STEPS, step(3, (0.5, 1.0)), step(4, (0.4, 1.0))])
    stage = SavedRun.open(tmp_path).stages[0]
    assert [record.step for record in stage] == [0, 1, 2, 3, 4]
    assert stage[3].held_out == {"cat": 0.5, "dog": 0.5}


def test_a_line_that_was_cut_off(tmp_path):
    write_run(tmp_path, "metrics")
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 5, "obj')
    assert [record.step for record in SavedRun.open(tmp_path).stages[0]] == [0, 1, 2, 3, 4]


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"no run folder: it has no recipe\.yaml; give"):
        SavedRun.open(tmp_path)
    write_run(tmp_path, *ALL)
    (tmp_path / "metrics.jsonl").write_text("{}\n" + json.dumps(STEPS[0]) + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 1: KeyError"):
        SavedRun.open(tmp_path)
    write_run(tmp_path, *ALL)
    (tmp_path / "results.json").write_text('{"rows": [{"method": "base"}]}')
    with pytest.raises(InputError, match=r"results\.json: KeyError\('tasks'\)"):
        SavedRun.open(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(InputError, match=r"results\.json is not JSON"):
        SavedRun.open(tmp_path)
    (tmp_path / "recipe.yaml").write_text("- a list")
    with pytest.raises(InputError, match=r"recipe\.yaml: expected fields such as base"):
        SavedRun.open(tmp_path)


def test_tasks_without_names(tmp_path):
    write_run(tmp_path)
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"tasks": 3}))
    with pytest.raises(InputError, match=r"recipe\.yaml: tasks: expected tasks by name"):
        SavedRun.open(tmp_path)


def test_a_recipe_that_is_not_of_a_run(tmp_path):
    text = "base: org/base\ntasks:\n  a: {expert: org/a, calibration: a.jsonl}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(InputError, match=r"no run folder: its recipe\.yaml lacks base\.path"):
        SavedRun.open(tmp_path)
