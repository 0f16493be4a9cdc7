"""The README's first line, with hardly any training."""

import json
import sys
from pathlib import Path

import pytest

from tests.references import load_script

QUICKSTART = Path(__file__).parents[2] / "experiments" / "quickstart.py"


def test_runs_from_training_to_the_merged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    quickstart = load_script(QUICKSTART)
    monkeypatch.setattr(quickstart, "BASE_STEPS", 10)
    monkeypatch.setattr(quickstart, "EXPERT_STEPS", 10)
    split, recipe = quickstart.split, quickstart.recipe

    def fewer(*arguments):
        parts = split(*arguments).items()
        return {part: (images[:90], labels[:90]) for part, (images, labels) in parts}

    monkeypatch.setattr(quickstart, "split", fewer)
    shorter = {"learning": {"steps": 10, "evaluate_every": 5, "copies": 1}}
    monkeypatch.setattr(quickstart, "recipe", lambda seed: recipe(seed) | shorter)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--out", str(tmp_path / "made")])
    quickstart.main()
    run = tmp_path / "made" / "run"
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert [set(row["tasks"]) for row in rows] == [set(quickstart.TASKS)] * 8
    for task in quickstart.TASKS:
        assert (run / "checkpoint" / "tasks" / task / "config.json").is_file()
    said = capsys.readouterr().out
    for name in ("merged checkpoint", "coefficients", "heat map"):
        assert name in said


def test_refuses_a_folder_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        load_script(QUICKSTART).main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "is not empty" in said
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
