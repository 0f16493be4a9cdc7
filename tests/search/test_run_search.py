"""Searches and fronts, from the recipe to the run folder."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from adamerge_jax.cli import main as cli
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.pipeline.fold import fold
from adamerge_jax.pipeline.learn import LearningInputs, prepare
from adamerge_jax.pipeline.models import open_models
from adamerge_jax.pipeline.workspace import open_workspace
from adamerge_jax.recipes.loading import load_recipe, parse_recipe
from adamerge_jax.runs.evaluations import Evaluation, append_evaluation, read_evaluations
from adamerge_jax.runs.front import Front, non_dominated
from adamerge_jax.search import scored as scored_module
from adamerge_jax.search.candidates import Candidates
from adamerge_jax.search.scored import Scored
from adamerge_jax.search.scores import on_validation_data, task_score
from adamerge_jax.search.search_coefficients import method_without_objective
from tests.references import write_recipe

SINGLES = [0.2, 0.5, 0.8]

Fields = dict[str, Any]


@pytest.fixture(scope="module")
def fields(image_fields: Fields) -> Fields:
    """Two experts with labelled validation data, to be scored by their loss."""
    fields = copy.deepcopy(image_fields)
    for task in fields["tasks"].values():
        task["validation"] = task["test"]
    fields["evaluation"] = {"task_arithmetic": SINGLES}
    fields["search"] = {"evaluations": 24, "layer_groups": 2, "score": "loss"}
    fields["front"] = {"points": 4, "samples": 12, "score": "loss"}
    fields["export"] = {"orbax": False}
    fields["heads"] = "refitted"  # which is for learning: here they are the experts'
    return fields


@pytest.fixture(scope="module")
def searched(fields: Fields, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searched")
    cli.main(["search", str(write_recipe(folder, fields)), "--out", str(folder / "run")])
    return folder / "run"


@pytest.fixture(scope="module")
def front(fields: Fields, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("front")
    cli.main(["front", str(write_recipe(folder, fields)), "--out", str(folder / "run")])
    return folder / "run"


def inputs_of(fields: Fields) -> LearningInputs:
    recipe = parse_recipe(fields)
    workspace = open_workspace(recipe, Path())
    return prepare(method_without_objective(recipe, workspace.models), workspace)


def without_times(log: list[Evaluation]) -> list[Evaluation]:
    return [evaluation._replace(seconds=0.0) for evaluation in log]


def failure(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that exits with 2; returns the line that it says."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    said = capfd.readouterr().err
    assert caught.value.code == 2 and len(said.splitlines()) == 1, said
    return said


def test_the_search_beats_the_best_single_coefficient(searched: Path):
    log = read_evaluations(searched / "evaluations.jsonl")
    assert [e.phase for e in log] == ["single"] * 3 + ["search"] * 21
    assert [set(np.ravel(list(e.coefficients.values()))) for e in log[:3]] == [
        {value} for value in SINGLES
    ]
    single, best = (min(of, key=lambda e: e.score) for of in (log[:3], log))
    assert best.score < 0.9 * single.score
    coefficients = Coefficients.load(searched / "coefficients.safetensors")
    assert coefficients.step == best.number and coefficients.initial in SINGLES
    for group, values in best.coefficients.items():
        np.testing.assert_array_equal(coefficients.values[group], np.float32(values))


def test_the_score_is_that_of_the_merge(searched: Path, fields: Fields):
    """The loss of the written checkpoint, whose merge the file repeats."""
    inputs = inputs_of(fields)
    coefficients = Coefficients.load(searched / "coefficients.safetensors")
    log = read_evaluations(searched / "evaluations.jsonl")
    evaluator, validation = inputs.workspace.evaluator, inputs.workspace.data.validation
    candidates = Candidates(inputs, 2)
    best = log[coefficients.step - 1]
    parameters = candidates.parameters(candidates.point(best.coefficients))
    for task, examples in validation.items():
        logits = evaluator.logits(parameters, task, examples).astype(np.float64)
        losses = np.log(np.exp(logits).sum(-1)) - logits[range(len(logits)), examples.labels]
        assert best.tasks[task] == pytest.approx(losses.mean(), rel=1e-6)
    assert best.score == pytest.approx(np.mean(list(best.tasks.values())))
    models = inputs.workspace.models
    folded = dict(fold(models, coefficients))
    name = next(other for other in folded if other.endswith("layer.1.output.dense.weight"))
    expected = np.asarray(parameters[name.replace(".1.", ".*.")][1])
    np.testing.assert_allclose(folded[name], expected, atol=1e-6)


def test_the_run_folder_is_an_ordinary_one(searched: Path, capfd: pytest.CaptureFixture[str]):
    assert not (searched / "state").exists()
    rows = json.loads((searched / "results.json").read_text())["rows"]
    assert rows[-1]["method"] == "searched (groups)" and rows[-1]["kind"] == "learned"
    single = Coefficients.load(searched / "coefficients.safetensors").initial
    assert f"task arithmetic ({single:g}, chosen with labels)" in [row["method"] for row in rows]
    page = (searched / "report.html").read_text()
    assert "Every merge that was scored, by loss on the validation data" in page
    assert 'id="curves"' not in page and "learned by minimising" not in page
    card = (searched / "checkpoint" / "README.md").read_text()
    assert "found by a search for the best loss on the validation data" in card
    recipe = searched.parent / "recipe.yaml"
    cli.main(["search", str(recipe), "--out", str(searched), "--resume"])
    assert "nothing left to do" in capfd.readouterr().out
    said = failure(capfd, "learn", str(recipe), "--out", str(searched), "--resume")
    assert "was started with another command, which wrote evaluations.jsonl" in said


@pytest.mark.parametrize(("command", "stops"), [("search", [1, 9, 16]), ("front", [2, 20])])
def test_a_killed_run_goes_on_bit_for_bit(
    command: str,
    stops: list[int],
    fields: Fields,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
):
    """Also where the kill left half a line, and where it was killed more than once."""
    whole = request.getfixturevalue({"search": "searched", "front": "front"}[command])
    arguments = [command, str(write_recipe(tmp_path, fields)), "--out", str(tmp_path / "run")]
    for stop in stops:

        def append(file: Path, evaluation: Evaluation, stop=stop) -> None:
            if evaluation.number == stop:
                with file.open("a") as stream:
                    stream.write('{"number": ')
                raise MemoryError("killed")
            append_evaluation(file, evaluation)

        monkeypatch.setattr(scored_module, "append_evaluation", append)
        with pytest.raises(SystemExit):
            cli.main([*arguments, "--resume"])
        assert (tmp_path / "run" / "state").is_dir()
    monkeypatch.undo()
    measured = []
    measure = Scored._measure
    monkeypatch.setattr(
        Scored, "_measure", lambda *rest: (measured.append(rest[-1]), measure(*rest))[1]
    )
    cli.main([*arguments, "--resume"])
    assert min(measured) == stops[-1]  # nothing was measured twice
    logs = [read_evaluations(folder / "evaluations.jsonl") for folder in (whole, tmp_path / "run")]
    assert without_times(logs[0]) == without_times(logs[1])
    name = {"search": "coefficients.safetensors", "front": "front.json"}[command]
    assert (whole / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_nothing_is_compiled_for_a_further_candidate(fields: Fields):
    inputs = inputs_of(fields)
    candidates = Candidates(inputs, 2)
    workspace = inputs.workspace
    loss = task_score("loss", workspace, "search")
    score = on_validation_data(loss, workspace, list(workspace.models.experts))
    scored = Scored(candidates, score, [])
    scored(candidates.all_at(0.3), "single")
    compiled = []

    def count(event: str, seconds: float, **_: Any) -> None:
        if "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    jax.jit(lambda x: x * 3)(1.0)
    assert compiled  # it would be noticed
    compiled.clear()
    for value in (0.1, 0.7):
        scored(candidates.all_at(value), "single")
    scored(np.linspace(0, 1, candidates.size), "search")
    assert not compiled
    jax.monitoring.clear_event_listeners()


def test_the_log_of_another_search_is_refused(
    fields: Fields, searched: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    recipe = write_recipe(tmp_path, fields)
    out = tmp_path / "run"
    (out / "state").mkdir(parents=True)
    (out / "recipe.yaml").write_bytes((searched / "recipe.yaml").read_bytes())
    log = (searched / "evaluations.jsonl").read_text().replace("[0.5, 0.5]", "[0.4, 0.4]")
    (out / "evaluations.jsonl").write_text("".join(log.splitlines(keepends=True)[:5]))
    said = failure(capfd, "search", str(recipe), "--out", str(out), "--resume")
    assert "evaluation 2 of the run folder is of other coefficients" in said


SCORE = """
import hashlib, sys
content = open(sys.argv[1] + "/model.safetensors", "rb").read()
print("scored 1 merge:", int.from_bytes(hashlib.sha256(content).digest()[:3]) / 2**24)
"""


def test_a_command_gives_the_score(
    fields: Fields, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """A score that cannot be guessed: the hash of the checkpoint's weights."""
    fields = copy.deepcopy(fields) | {"search": {"evaluations": 5}}
    for task in fields["tasks"].values():
        del task["validation"]
    recipe, out = write_recipe(tmp_path, fields), tmp_path / "run"
    (tmp_path / "score.py").write_text(SCORE)
    command = f"{sys.executable} {tmp_path / 'score.py'} {{checkpoint}}"
    options = ["search", str(recipe), "--out", str(out), "--score-command", command]
    cli.main(options)
    log = read_evaluations(out / "evaluations.jsonl")
    best = max(log, key=lambda e: e.score)
    assert len({e.score for e in log}) == 5 and not log[0].tasks
    assert Coefficients.load(out / "coefficients.safetensors").step == best.number
    again = float(run_score(tmp_path / "score.py", out / "checkpoint"))
    assert again == best.score  # the file that was scored is the file that was written
    rows = json.loads((out / "results.json").read_text())["rows"]
    single = max(log[:3], key=lambda e: e.score).coefficients["all"][0]
    assert rows[-2]["method"] == f"task_arithmetic (coefficient {single:g})"
    assert not list(out.glob(".*"))  # no candidate is left


def run_score(script: Path, checkpoint: Path) -> str:
    done = subprocess.run(
        [sys.executable, script, checkpoint], capture_output=True, text=True, check=True
    )
    return done.stdout.split()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["search"], "tasks.shape.validation: is missing; merges are scored on validation data"),
        (["front"], "tasks.shape.validation: is missing; merges are scored on validation data"),
        (
            ["search", "--search.evaluations", "3"],
            "leave nothing to search with after the 3 single",
        ),
        (["search", "--search.bounds", "1", "0"], "search.bounds: found 1 to 0"),
        (["search", "--search.bounds", "2", "3"], "search.bounds: no single coefficient of"),
        (["search", "--score-command", "false {checkpoint}"], "false ended with exit status 1"),
        (["search", "--score-command", "true {checkpoint}"], "true printed no number"),
        (["search", "--score-command", "true"], "does not say where the checkpoint goes"),
        (["search", "--score-command", "true {checkpoint}", "--score-timeout", "0"], "over 0"),
        (["front", "--front.samples", "6"], "front.samples: 6 merges cannot tell the 6 numbers"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str],
    words: str,
    fields: Fields,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
):
    fields = copy.deepcopy(fields)
    for task in fields["tasks"].values():
        del task["validation"]
    recipe, out = write_recipe(tmp_path, fields), tmp_path / "run"
    command, *options = arguments
    assert words in failure(capfd, command, str(recipe), "--out", str(out), *options)
    assert not out.exists()


@pytest.mark.parametrize("section", ["search", "front"])
def test_an_unknown_score(
    section: str, fields: Fields, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    recipe = write_recipe(tmp_path, fields | {section: {"score": "beauty"}})
    said = failure(capfd, section, str(recipe), "--out", str(tmp_path / "run"))
    assert f"field {section}.score: found 'beauty'" in said
    assert not (tmp_path / "run").exists()


def test_too_many_layer_groups(fields: Fields, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    recipe, out = write_recipe(tmp_path, fields), tmp_path / "run"
    options = ["--search.layer-groups", "3"]
    said = failure(capfd, "search", str(recipe), "--out", str(out), *options)
    assert "search.layer_groups: 3 groups of 2 layers" in said and not out.exists()


def test_the_front_is_of_merges_that_none_dominates(front: Path):
    found = Front.read(front / "front.json")
    log = read_evaluations(front / "evaluations.jsonl")
    assert [e.phase for e in log[:15]] == ["single"] * 3 + ["sample"] * 12
    assert all(e.phase == "front" for e in log[15:])
    scores = -np.array([list(e.tasks.values()) for e in log])  # losses
    best = {tuple(row) for row in scores[non_dominated(scores)]}
    points = [tuple(-value for value in point.scores.values()) for point in found.points]
    assert set(points) <= best and 2 <= len(points) <= 4
    assert points == sorted(points, reverse=True)
    assert max(map(np.mean, best)) in [pytest.approx(np.mean(point)) for point in points]
    for column in range(2):
        assert max(row[column] for row in best) == max(row[column] for row in points)
    assert len(found.singles) == 3 and len(found.others) + len(found.points) <= len(log)
    for fit in found.fits.values():
        assert 0 <= fit.error <= fit.left_out_error and fit.error < fit.spread


def test_any_point_of_a_front_can_be_folded(front: Path, fields: Fields):
    found = Front.read(front / "front.json")
    inputs = inputs_of(fields)
    models = open_models(load_recipe(front.parent / "recipe.yaml"), front.parent)
    files = sorted(file.name for file in (front / "front").iterdir())
    assert files == [point.file for point in found.points]
    for point in (found.points[0], found.points[-1]):
        coefficients = Coefficients.load(front / "front" / point.file)
        values = np.array(list(point.coefficients.values()))
        np.testing.assert_array_equal(coefficients.values["all"], np.float32(values))
        candidates = Candidates(inputs, 1)
        folded = dict(fold(models, coefficients))
        name = next(other for other in folded if other.endswith("layer.1.output.dense.weight"))
        expected = np.asarray(candidates.parameters(values)[name.replace(".1.", ".*.")][1])
        np.testing.assert_allclose(folded[name], expected, atol=1e-6)


def test_a_front_has_a_table_and_a_page(front: Path, capfd: pytest.CaptureFixture[str]):
    found = Front.read(front / "front.json")
    rows = {row["method"]: row for row in json.loads((front / "results.json").read_text())["rows"]}
    best = f"front {found.best + 1:02}, best on average"
    assert list(rows)[-1] == best and rows[best]["tasks"] == found.points[found.best].test
    page = (front / "report.html").read_text()
    assert 'id="front"' in page and 'id="search"' not in page and (front / "front.png").is_file()
    recipe = front.parent / "recipe.yaml"
    cli.main(["front", str(recipe), "--out", str(front), "--resume"])
    assert "nothing left to do" in capfd.readouterr().out


def test_a_front_of_one_task(fields: Fields, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    fields = fields | {"tasks": {"shape": fields["tasks"]["shape"]}}
    recipe = write_recipe(tmp_path, fields)
    assert "give two tasks or more" in failure(
        capfd, "front", str(recipe), "--out", str(tmp_path / "x")
    )
