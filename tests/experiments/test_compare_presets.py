"""What `experiments/compare_presets.py` refuses before hours of learning."""

from pathlib import Path

import pytest

from tests.references import load_script, write_recipe

SCRIPT = Path(__file__).parents[2] / "experiments" / "compare_presets.py"
LABELLED = {"path": "labelled.jsonl", "label": "label"}
COMPLETE = {
    "expert": "law",
    "calibration": "law.jsonl",
    "test": LABELLED,
    "validation": LABELLED,
}


@pytest.mark.parametrize(
    ("missing", "options", "message"),
    [
        ("test", [], "tasks.law.test: is missing"),
        ("validation", [], "tasks.law.validation: is missing, and atlas, atlas-k learn from it"),
        (None, ["--presets", "adamergin"], "--presets: no 'adamergin'; there are adamerging"),
    ],
)
def test_what_is_missing(missing, options, message, tmp_path, monkeypatch, capsys):
    task = {name: own for name, own in COMPLETE.items() if name != missing}
    recipe = write_recipe(tmp_path, {"base": "base", "tasks": {"law": task}})
    monkeypatch.setattr("sys.argv", ["compare_presets.py", str(recipe), *options])
    with pytest.raises(SystemExit) as caught:
        load_script(SCRIPT).main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_labels_are_asked_of_presets_that_learn_from_them_alone(tmp_path):
    task = {name: own for name, own in COMPLETE.items() if name != "validation"}
    recipe = write_recipe(tmp_path, {"base": "base", "tasks": {"law": task}})
    load_script(SCRIPT).require_data(recipe, ["adamerging", "recommended"])
