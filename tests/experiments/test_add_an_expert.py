"""The experiment that adds an expert, in small."""

import json
import sys
from pathlib import Path

import pytest

from tests.references import load_script, write_recipe

SCRIPT = load_script(Path(__file__).parents[2] / "experiments" / "add_an_expert.py")


def test_add_an_expert(image_fields, tmp_path, monkeypatch, capsys):
    recipe, out = write_recipe(tmp_path, image_fields), tmp_path / "out"
    arguments = [str(recipe), "--new", "colour", "--out", str(out)]
    arguments += ["--warm-learning-rate", "0.02"]  # as from scratch: the same compiled step
    monkeypatch.setattr(sys, "argv", ["add_an_expert.py", *arguments])
    SCRIPT.main()
    printed = capsys.readouterr().out
    assert "new, starting at 0.3: colour" in printed
    assert "from scratch" in printed
    results = json.loads((out / "add_an_expert.json").read_text())
    scratch, warm = results["from scratch"], results["from the others' coefficients"]
    assert list(scratch["accuracy"]) == ["0", "1", "2", "3"]
    assert list(warm["accuracy"]) == ["0", "1"]
    assert scratch["accuracy"]["3"].keys() == image_fields["tasks"].keys()
    # Nothing is learned twice.
    monkeypatch.setattr(SCRIPT, "learn_coefficients", None)
    SCRIPT.main()
    assert json.loads((out / "add_an_expert.json").read_text()) == results


def test_in_words():
    evaluations = {0: {"a": 0.5, "b": 0.3}, 6: {"a": 0.9, "b": 0.7}, 12: {"a": 1.0, "b": 0.7}}
    scratch = SCRIPT.Curve(12, 0.1, 1.0, evaluations)
    warm = SCRIPT.Curve(4, 0.05, 1.0, {0: evaluations[0], 2: evaluations[12], 4: evaluations[6]})
    words = SCRIPT.in_words({SCRIPT.SCRATCH: scratch, SCRIPT.WARM: warm})
    assert words.endswith("reached after 2 (17% of the steps)")
    warm = warm._replace(accuracy={0: evaluations[0], 4: evaluations[6]})
    words = SCRIPT.in_words({SCRIPT.SCRATCH: scratch, SCRIPT.WARM: warm})
    assert words.endswith("80.0 at most in 4: not reached")


def test_a_task_that_is_not_in_the_recipe(text_fields, tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, text_fields)
    monkeypatch.setattr(sys, "argv", ["add_an_expert.py", str(recipe), "--new", "tune"])
    with pytest.raises(SystemExit):
        SCRIPT.main()
    assert "--new tune: the tasks are tone, topic, mood" in capsys.readouterr().err
