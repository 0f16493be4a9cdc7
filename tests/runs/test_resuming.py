"""Runs that are killed and go on: the same bits as those of a run that nothing happened to."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml

from adamerge_jax.cli import main as cli
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.errors import InputError
from adamerge_jax.learning.snapshots import last_step, load_snapshot, save_snapshot
from adamerge_jax.pipeline import run_learn
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.runs.lock import hold
from adamerge_jax.runs.progress import show_progress
from adamerge_jax.runs.resuming import require_startable
from tests.references import WITHOUT_FIGURES, WITHOUT_PYTORCH, write_recipe

COARSE = {
    "coefficients": {"granularity": "row", "coarse": {"granularity": "tensor", "steps": 4}},
    "learning": {
        "steps": 6,
        "evaluate_every": 2,
        "batch_size": 4,
        "optimizer": {"learning_rate": 0.02, "schedule": "cosine_decay_schedule"},
    },
}


class Killed(BaseException):
    """What stands for a signal that cannot be caught."""


def learn(folder: Path, fields: dict[str, Any], *options: str) -> Path:
    folder.mkdir(exist_ok=True)
    recipe = write_recipe(folder, fields)
    cli.main(["learn", str(recipe), "--out", str(folder / "run"), *options])
    return folder / "run"


def kill_after(monkeypatch: pytest.MonkeyPatch, records: int) -> None:
    """Ends the run when so many records are in the metrics."""

    def kill():
        raise Killed

    call_after(monkeypatch, records, kill)


def signal_after(monkeypatch: pytest.MonkeyPatch, records: int, number: int) -> None:
    """Sends a signal when so many records are in the metrics."""
    call_after(monkeypatch, records, lambda: os.kill(os.getpid(), number))


def call_after(monkeypatch: pytest.MonkeyPatch, records: int, call: Callable[[], None]) -> None:
    """Calls a function when so many records are in the metrics."""
    seen = 0

    def killing(*arguments):
        shown = show_progress(*arguments)

        class Watch:
            def __enter__(self):
                show = shown.__enter__()

                def count(progress):
                    nonlocal seen
                    show(progress)
                    seen += 1
                    if seen == records:
                        call()

                return count

            def __exit__(self, *error):
                return shown.__exit__(*error)

        return Watch()

    monkeypatch.setattr(run_learn, "show_progress", killing)


def require_same(run: Path, undisturbed: Path) -> None:
    found, expected = (
        Coefficients.load(each / "coefficients.safetensors") for each in (run, undisturbed)
    )
    assert found.step == expected.step > 0
    assert found.values.keys() == expected.values.keys()
    for group, values in expected.values.items():
        np.testing.assert_array_equal(found.values[group], values, strict=True)
    records = [metrics(each) for each in (run, undisturbed)]
    assert records[0] == records[1]
    folders = [sorted(file.name for file in each.iterdir()) for each in (run, undisturbed)]
    assert folders[0] == folders[1]
    assert "state" not in folders[0]


def metrics(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: own for key, own in record.items() if key != "seconds"} for record in records]


@pytest.fixture(scope="module")
def fields(image_fields) -> dict[str, Any]:
    """A recipe of two stages, without test data."""
    tasks = {
        name: {key: own for key, own in task.items() if key != "test"}
        for name, task in image_fields["tasks"].items()
    }
    return image_fields | COARSE | {"tasks": tasks}


@pytest.fixture(scope="module")
def undisturbed(fields, tmp_path_factory) -> Path:
    return learn(tmp_path_factory.mktemp("undisturbed"), fields)


def test_a_run_that_starts_from_a_merge_goes_on(fields, tmp_path, monkeypatch):
    """Its merge is made again, and is the same."""
    start = {"constraint": "free", "initial_merge": {"name": "ties", "options": {"density": 0.5}}}
    fields = fields | {"coefficients": fields["coefficients"] | start}
    with monkeypatch.context() as patched:
        kill_after(patched, 9)
        with pytest.raises(Killed):
            learn(tmp_path / "killed", fields)
    run, undisturbed = learn(tmp_path / "killed", fields, "--resume"), learn(tmp_path, fields)
    require_same(run, undisturbed)
    weights = [folder / "checkpoint" / "model.safetensors" for folder in (run, undisturbed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


# There are 5 records of the coarse stage, then 7. Before anything is kept, and between looks of the
# second stage; signals stop the first one.
@pytest.mark.parametrize("records", [1, 9])
def test_going_on_gives_the_same_bits(records, fields, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        kill_after(patched, records)
        with pytest.raises(Killed):
            learn(tmp_path, fields)
    assert len(metrics(tmp_path / "run")) == records
    require_same(learn(tmp_path, fields, "--resume"), undisturbed)


def test_killed_while_exporting(fields, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:

        def killed(*arguments):
            raise Killed

        patched.setattr("adamerge_jax.pipeline.export.save_parameters", killed)
        with pytest.raises(Killed):
            learn(tmp_path, fields, "--export.orbax")
    run = tmp_path / "run"
    (run / ".checkpoint.partial-0123").mkdir()
    assert (run / "checkpoint").is_dir() and not (run / "orbax").exists()
    learn(tmp_path, fields, "--export.orbax", "--resume")
    shutil.rmtree(run / "orbax")  # which the undisturbed run has not
    require_same(run, undisturbed)


def test_killed_while_evaluating(image_fields, tmp_path, monkeypatch):
    """The checkpoint is there by then, and is not written again; nothing is asked or learned."""
    fields = image_fields | {"learning": {"steps": 2, "evaluate_every": 1, "batch_size": 4}}
    fields["heads"] = "refitted"
    (tmp_path / "undisturbed").mkdir()
    expected = learn(tmp_path / "undisturbed", fields)
    with monkeypatch.context() as patched:

        def killed(*arguments):
            raise Killed

        patched.setattr(run_learn, "learned_row", killed)
        with pytest.raises(Killed):
            learn(tmp_path, fields)
    run = tmp_path / "run"
    weights = run / "checkpoint" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert (run / "state").is_dir()
    with monkeypatch.context() as patched:
        for name in ("ask_expert", "evaluate_held_out", "fit_heads"):
            patched.delattr(f"adamerge_jax.pipeline.learn.{name}")
        resumed = learn(tmp_path, fields, "--resume")
    require_same(resumed, expected)
    assert weights.stat().st_mtime_ns == before
    for name in ("checkpoint/README.md", "results.json"):
        assert (run / name).read_bytes() == (expected / name).read_bytes()


@pytest.fixture
def heeded_interrupts() -> Iterator[None]:
    """Interrupts as programs on a terminal have them; in the background a shell ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded_interrupts")
@pytest.mark.parametrize(
    ("number", "status", "records"), [(signal.SIGTERM, 143, 9), (signal.SIGINT, 130, 3)]
)
def test_signals_keep_the_state(
    number, status, records, fields, undisturbed, tmp_path, monkeypatch, capsys
):
    """Between evaluations too: no step is taken twice."""
    with monkeypatch.context() as patched:
        signal_after(patched, records, number)
        with pytest.raises(SystemExit) as caught:
            learn(tmp_path, fields)
    assert caught.value.code == status
    run = tmp_path / "run"
    again = f"go on with: adamerge learn {tmp_path / 'recipe.yaml'} --out {run} --resume"
    assert capsys.readouterr().err.rstrip().endswith(again)
    assert len(metrics(run)) == records
    assert not (run / ".lock").exists()
    learn(tmp_path, fields, "--resume")
    # A stage has a record for its start.
    taken = records - 1 if records <= 5 else records - 2
    assert f"going on after {taken} steps" in capsys.readouterr().out
    require_same(run, undisturbed)


def test_a_second_start_is_refused(fields, tmp_path, capsys):
    with hold(tmp_path / "run"):
        for option in ([], ["--resume"]):
            assert f"is in use by process {os.getpid()}" in error_of(
                capsys, tmp_path, fields, *option
            )
    assert not (tmp_path / "run").exists()


def fold(folder: Path, undisturbed: Path) -> Path:
    file = undisturbed / "coefficients.safetensors"
    recipe = str(undisturbed.parent / "recipe.yaml")
    cli.main(["fold", recipe, str(file), "--out", str(folder), "--export.orbax"])
    return folder


@pytest.mark.parametrize(
    "place",
    [
        "adamerge_jax.checkpoints.huggingface_export.write_index",
        "adamerge_jax.pipeline.export.save_parameters",
        "adamerge_jax.runs.resuming.remove_folder",
    ],
)
def test_a_killed_fold_is_started_anew(place, undisturbed, tmp_path, monkeypatch):
    def contents(folder: Path) -> dict[str, bytes]:
        files = (file for file in folder.rglob("*") if file.is_file())
        return {str(f.relative_to(folder)): f.read_bytes() for f in files if "orbax" not in f.parts}

    expected = fold(tmp_path / "undisturbed", undisturbed)
    out = tmp_path / "out"
    with monkeypatch.context() as patched:

        def killed(*arguments):
            raise Killed

        patched.setattr(place, killed)
        # No process that is killed removes what it has half written.
        patched.setattr("adamerge_jax.checkpoints.folders.shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            fold(out, undisturbed)
    assert os.listdir(out)
    fold(out, undisturbed)
    assert contents(out) == contents(expected)
    assert sorted(os.listdir(out)) == sorted(os.listdir(expected)) == ["checkpoint", "orbax"]


def test_fold_leaves_other_files_alone(undisturbed, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "state").mkdir(parents=True)
    (out / "notes.txt").touch()
    with pytest.raises(SystemExit):
        fold(out, undisturbed)
    assert "is not empty" in capsys.readouterr().err
    assert sorted(os.listdir(out)) == ["notes.txt", "state"]


def error_of(capsys, folder: Path, fields: dict[str, Any], *options: str) -> str:
    with pytest.raises(SystemExit) as caught:
        learn(folder, fields, *options)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_what_is_refused(fields, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        kill_after(patched, 3)
        with pytest.raises(Killed):
            learn(tmp_path, fields)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "run").rglob("*")}
    assert "go on with it with --resume" in error_of(capsys, tmp_path, fields)
    said = error_of(capsys, tmp_path, fields, "--resume", "--learning.optimizer.learning-rate", "1")
    assert "another recipe: learning.optimizer.learning_rate was 0.02, now it is 1.0" in said
    backwards = fields | {"tasks": dict(reversed(fields["tasks"].items()))}
    said = error_of(capsys, tmp_path, backwards, "--resume")
    assert "another recipe: tasks was ['shape', 'colour'], now it is ['colour', 'shape']" in said
    said = error_of(capsys, tmp_path, fields, "--resume", "--seed", "3")
    assert "another recipe: seed was 0, now it is 3" in said
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path / "run").rglob("*")}


def test_what_has_ended_is_left_as_it_is(undisturbed, fields, tmp_path, capsys):
    before = {f: f.stat().st_mtime_ns for f in undisturbed.rglob("*")}
    # Killed while it tidied up: all is done but for removing what was renamed.
    (undisturbed / ".state.partial-0123" / "learning").mkdir(parents=True)
    learn(undisturbed.parent, fields, "--resume")
    assert "has ended; there is nothing left to do" in capsys.readouterr().out
    assert before == {f: f.stat().st_mtime_ns for f in undisturbed.rglob("*")}
    said = error_of(capsys, undisturbed.parent, fields, "--resume", "--seed", "3")
    assert "started with another recipe" in said
    assert "is not empty" in error_of(capsys, undisturbed.parent, fields)


def test_what_is_no_run_cannot_go_on(fields, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").touch()
    assert "holds no run to go on with" in error_of(capsys, tmp_path, fields, "--resume")
    assert os.listdir(tmp_path / "run") == ["something"]


def test_a_run_that_is_killed(fields, tmp_path):
    """A process that is killed by the system, and another one that goes on."""
    learning = COARSE["learning"] | {"steps": 100, "evaluate_every": 20}
    fields = fields | {"coefficients": {"granularity": "tensor"}, "learning": learning}
    expected = learn(tmp_path / "undisturbed", fields)
    recipe = write_recipe(tmp_path, fields)
    run = tmp_path / "run"
    script = f"{WITHOUT_PYTORCH}{WITHOUT_FIGURES}from adamerge_jax.cli.main import main; main()"
    command = [sys.executable, "-c", script, "learn", str(recipe), "--out", str(run), "--resume"]
    variables = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    variables |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    process = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        lines = run / "metrics.jsonl"
        if lines.is_file() and lines.read_bytes().count(b"\n") > 50:
            process.kill()
            break
        time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL
    assert not (run / "coefficients.safetensors").exists()
    # What was compiled before is not compiled again, from one process to the next.
    compiled = {file: file.stat().st_mtime_ns for file in programs(tmp_path)}
    assert compiled
    subprocess.run(command, env=variables, check=True, stdout=subprocess.DEVNULL)
    require_same(run, expected)
    assert compiled.items() <= {f: f.stat().st_mtime_ns for f in programs(tmp_path)}.items()


def programs(folder: Path) -> list[Path]:
    return list((folder / "cache" / "adamerge_jax" / "compiled").glob("jit_*-cache"))


def test_snapshots_keep_every_bit(tmp_path):
    raw = {"a": jnp.asarray([[1e-38, np.nan, -0.0]]), "b": jnp.ones((2, 3), jnp.bfloat16)}
    tree = (raw, optax.adam(1e-3).init(raw), 7, np.array([True, False]))
    folder = tmp_path / "state" / "learning"
    assert last_step(folder) is None and load_snapshot(folder, tree) is None
    save_snapshot(folder, 3, tree)
    save_snapshot(folder, 5, tree)
    assert last_step(folder) == 5
    assert len(list(folder.iterdir())) == 1
    found = load_snapshot(folder, tree)
    assert found[2] == 7 and type(found[2]) is int
    for key, array in raw.items():
        assert found[0][key].dtype == array.dtype
        assert found[0][key].tobytes() == np.asarray(array).tobytes()
    assert found[1][0].count == 0 and found[3].tolist() == [True, False]
    with pytest.raises(InputError, match="of something else"):
        load_snapshot(folder, (raw, 7))
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    for read in (last_step, lambda folder: load_snapshot(folder, tree)):
        with pytest.raises(InputError, match=r"cannot be read: .* start again"):
            read(folder)


def test_a_field_that_is_missing_is_as_one_that_is_null(tmp_path, fields):
    recipe = parse_recipe(fields).model_dump(mode="json")
    before = copy.deepcopy(recipe)
    before["learning"]["optimizer"]["options"] = {"mu_dtype": None}
    run = tmp_path / "run"
    (run / "state").mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(before, sort_keys=False))
    require_startable(run, recipe, resume=True)
    before["learning"]["optimizer"]["options"] = {"mu_dtype": "bfloat16"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(before, sort_keys=False))
    with pytest.raises(InputError, match=r"optimizer\.options\.mu_dtype was 'bfloat16', now it is"):
        require_startable(run, recipe, resume=True)
