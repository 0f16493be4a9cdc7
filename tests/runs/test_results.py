import json
import math

import pytest

from adamerge_jax.errors import InputError
from adamerge_jax.runs.outcome import measure_outcome
from adamerge_jax.runs.results import Results, read_results, write_results
from adamerge_jax.runs.rows import Row
from tests.runs.test_outcome import ROWS

OLD = [
    {"method": "base", "metric": "accuracy", "tasks": {"a": 0.2}, "average": 0.2},
    {"method": "experts (one model each)", "metric": "accuracy", "tasks": {"a": 0.9}},
    {"method": "task arithmetic (0.3)", "metric": "accuracy", "tasks": {"a": 0.4}},
    {"method": "learned (row)", "metric": "accuracy", "tasks": {"a": 0.65}},
]
"""The rows of a file from before rows had a kind."""


@pytest.mark.parametrize("metric", ROWS)
def test_what_is_written_is_read(metric, tmp_path):
    rows, file = ROWS[metric], tmp_path / "results.json"
    outcome = measure_outcome(rows)
    write_results(Results(rows, outcome), file)
    again = read_results(file)
    assert again.outcome == outcome
    assert again.rows == [row._replace(examples=None) for row in rows]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert file.stat().st_size < 5000  # for people: no scores of examples


def test_a_file_from_before(tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"rows": OLD}))
    rows, outcome = read_results(file)
    assert [row.kind for row in rows] == ["baseline", "experts", "baseline", "learned"]
    assert outcome.average.closed.value == pytest.approx(0.5)


def test_no_file(tmp_path):
    assert read_results(tmp_path / "results.json") == Results([])


def test_scores_that_are_no_numbers(tmp_path):
    rows = [Row("base", {"a": math.inf}, "loss"), Row("learned", {"a": math.nan}, "loss")]
    write_results(Results(rows, measure_outcome(rows)), tmp_path / "results.json")
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    again = read_results(tmp_path / "results.json")
    assert all(math.isnan(row.tasks["a"]) for row in again.rows)


def whole() -> dict:
    rows = [row.as_json() for row in ROWS["accuracy"]]
    average = {"score": {"value": rows[-1]["average"]}}
    tasks = {task: {"score": {"value": score}} for task, score in rows[-1]["tasks"].items()}
    return {"rows": rows, "outcome": {"tasks": tasks, "average": average, "reference": "baseline"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields["rows"][0].pop("tasks"), "KeyError.'tasks'"),
        (lambda fields: fields["rows"][0].update(method=3), "valid string"),
        (lambda fields: fields["rows"][0].update(metric="f1"), "'accuracy' or 'loss'"),
        (lambda fields: fields["rows"][0].update(kind="best"), "'baseline', 'experts'"),
        (lambda fields: fields["rows"][0]["tasks"].update(a="much"), "valid number"),
        (lambda fields: fields["rows"][0]["tasks"].pop("a"), "'experts' has other tasks"),
        (
            lambda fields: fields["rows"][0].update(metric="loss"),
            "'experts' has the metric 'accuracy'",
        ),
        (lambda fields: fields.update(rows=3), "TypeError"),
        (lambda fields: fields.update(rows=[3]), "TypeError"),
        (lambda fields: fields.update(outcome=[]), "dictionary or an instance of Outcome"),
        (lambda fields: fields["outcome"].pop("average"), "Field required"),
        (lambda fields: fields["outcome"].update(reference="experts"), "is not the best row"),
        (lambda fields: fields["rows"][-1]["tasks"].update(a=0.9), "not that of its rows"),
        (lambda fields: fields["outcome"]["tasks"].pop("a"), "not that of its rows"),
    ],
)
def test_what_is_no_table(change, message, tmp_path):
    file, fields = tmp_path / "results.json", whole()
    file.write_text(json.dumps(fields))
    read_results(file)
    change(fields)
    file.write_text(json.dumps(fields))
    with pytest.raises(InputError, match=rf"results\.json: .*{message}") as caught:
        read_results(file)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("content", [b"[]", b"null", b"{", b"[" * 200_000, b"\xff\xfe", b""])
def test_no_json_object(content, tmp_path):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(InputError, match=r"results\.json (is not JSON|holds no fields)"):
        read_results(tmp_path / "results.json")
