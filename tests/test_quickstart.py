"""The README's first line, with hardly any training."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.references import load_script

QUICKSTART = Path(__file__).parents[1] / "experiments" / "quickstart.py"


def test_runs_from_training_to_the_merged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    quickstart = load_script(QUICKSTART)
    monkeypatch.setattr(quickstart, "BASE_STEPS", 10)
    monkeypatch.setattr(quickstart, "EXPERT_STEPS", 10)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--out", str(tmp_path / "made")])
    quickstart.main()
    run = tmp_path / "made" / "run"
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert [set(row["tasks"]) for row in rows] == [set(quickstart.TASKS)] * 5
    for task in quickstart.TASKS:
        assert (run / "checkpoint" / "tasks" / task / "config.json").is_file()
    said = capsys.readouterr().out
    for name in ("merged checkpoint", "coefficients", "heat map"):
        assert name in said


def test_refuses_a_folder_in_use(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    done = subprocess.run(
        [sys.executable, QUICKSTART, "--out", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
