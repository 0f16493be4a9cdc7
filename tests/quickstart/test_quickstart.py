"""The example that comes with the package, with hardly any training."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits as load_from_scikit_learn

from adamerge_jax import quickstart
from adamerge_jax.cli import main as cli
from adamerge_jax.quickstart import digits, experts
from adamerge_jax.runs.files import RESULTS_FILE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {part: (x[:60], y[:60]) for part, (x, y) in digits.load_digits().items()}
    recipe = experts._recipe
    learning = {"learning": {"steps": 4, "evaluate_every": 2, "copies": 1}}
    monkeypatch.setattr(experts, "load_digits", lambda: parts)
    monkeypatch.setattr(experts, "_recipe", lambda seed: recipe(seed) | learning)
    brief = partial(quickstart.prepare, base_steps=10, expert_steps=10)
    monkeypatch.setattr(quickstart, "prepare", brief)


def test_runs_from_training_to_the_merged_checkpoint(shorter, tmp_path: Path, capsys):
    made = tmp_path / "made"
    cli.main(["quickstart", "--out", str(made)])
    run = made / "run"
    rows = json.loads((run / RESULTS_FILE).read_text())["rows"]
    assert [set(row["tasks"]) for row in rows] == [set(quickstart.TASKS)] * 8
    for task in quickstart.TASKS:
        assert (run / "checkpoint" / "tasks" / task / "config.json").is_file()
    printed = capsys.readouterr().out
    for name in ("merged checkpoint", "coefficients", "heat map"):
        assert name in printed

    # Once more: nothing is trained or learned again.
    files = {file: file.stat().st_mtime_ns for file in made.rglob("*") if file.is_file()}
    cli.main(["quickstart", "--out", str(made)])
    assert "merged checkpoint" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in made.rglob("*") if file.is_file()} == files


@pytest.mark.parametrize("name", ["notes.txt", "recipe.yaml"])
def test_refuses_a_folder_in_use(name: str, tmp_path: Path, capsys):
    (tmp_path / name).write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["quickstart", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and "is not empty" in printed
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_digits_are_those_that_they_are_said_to_be():
    everything = load_from_scikit_learn()
    theirs = {
        (image.tobytes(), label)
        for image, label in zip(
            everything.images.astype(np.float32), everything.target, strict=True
        )
    }
    ours = [
        ((image * 16).tobytes(), label)
        for images, labels in digits.load_digits().values()
        for image, label in zip(images, labels, strict=True)
    ]
    assert len(ours) == len(everything.images) == 1797
    assert set(ours) == theirs


def test_the_script_is_the_command():
    script = ROOT / "experiments" / "quickstart.py"
    done = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, check=True
    )
    assert "usage: adamerge quickstart" in done.stdout
