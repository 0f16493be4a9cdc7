import json
import math

import numpy as np
import pytest

from adamerge_jax.errors import InputError
from adamerge_jax.runs.outcome import measure_outcome
from adamerge_jax.runs.results import Results, read_results, write_results
from adamerge_jax.runs.rows import ExampleScores, Row
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


def test_tables_by_other_metrics(tmp_path):
    """Of the tasks that have them; rows that were not measured so are left out."""
    rows, table = [], []
    scores = ExampleScores(np.arange(20) % 3 == 0, np.ones(20, np.int32))
    for row in ROWS["loss"]:
        exact = Row.of_examples(row.method, {"a": scores}, "exact_match", row.kind)
        rows.append(row._replace(further=() if row.kind == "experts" else (exact,)))
        table.extend(rows[-1].further)
    results = Results.of_rows(rows)
    write_results(results, tmp_path / "results.json")
    again = read_results(tmp_path / "results.json")
    assert again.outcome == results.outcome
    (further,) = again.further
    assert [row.method for row in further.rows] == [row.method for row in table]
    assert further.rows[-1].tasks == {"a": 0.35}
    assert further.outcome == measure_outcome(table)
    assert further.outcome.average.score.interval is not None


def test_metrics_of_a_row():
    """The first one is that of the row; a task may lack the others."""
    score = ExampleScores(np.ones(3), np.ones(3, int))
    measures = {
        "text": {"loss": score, "token_accuracy": score},
        "chat": {"loss": score, "token_accuracy": score, "exact_match": score},
    }
    row = Row.of_measures("base", measures)
    assert (row.metric, list(row.tasks)) == ("loss", ["text", "chat"])
    tables = {further.metric: list(further.tasks) for further in row.further}
    assert tables == {"exact_match": ["chat"], "token_accuracy": ["text", "chat"]}


def test_a_file_from_before(tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"rows": OLD}))
    rows, outcome, further, _ = read_results(file)
    assert not further
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
        (lambda fields: fields["rows"][0].update(metric="f1"), "'accuracy', 'loss', 'exact_match'"),
        (lambda fields: fields["rows"][0].update(kind="best"), "'baseline', 'heads', 'experts'"),
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
        (lambda fields: fields.update(further=[3]), "valid dictionary"),
        (lambda fields: fields.update(further=[{}]), "another metric has no rows"),
        (
            lambda fields: fields.update(further=[fields | {"further": [whole()]}]),
            "tables within",
        ),
        (
            lambda fields: fields.update(further=[fields | {"outcome": None, "rows": [{}]}]),
            "KeyError.'method'",
        ),
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
