"""What `experiments/compare_presets.py` refuses before hours of learning."""

import argparse
import json
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


def test_baselines_and_the_part_of_the_gap(image_recipe, tmp_path):
    """The rows of a process that measures them are those that the table is made of."""
    script = load_script(SCRIPT)
    recipe = write_recipe(tmp_path, image_recipe)
    arguments = argparse.Namespace(root=tmp_path, until=None, examples=None)
    baselines = json.loads(json.dumps(script.run_one(arguments, recipe, "baselines", 0)))
    assert [row["kind"] for row in baselines.values()] == ["baseline", "experts", *["baseline"] * 2]
    best = max(row["average"] for row in baselines.values() if row["kind"] == "baseline")
    experts = baselines["experts (one model each)"]
    merged = dict.fromkeys(experts["tasks"], (best + experts["average"]) / 2)
    run = {"tasks": merged, "average": (best + experts["average"]) / 2, "coefficients": 3}
    run |= {"steps": 5, "seconds": 1.0, "peak_gigabytes": 2.0}
    runs = {"baselines 0": baselines, "adamerging 0": run, "adamerging 1": run}
    table = script.summarise("title", runs, ["adamerging"])
    closed = next(column for column in table.columns if column.header == "gap closed")
    assert list(closed.cells)[-1] == "50%"
