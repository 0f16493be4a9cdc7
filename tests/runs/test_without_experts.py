"""The file of a merge's scores without each expert is read as it was written, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from adamerge_jax.errors import InputError
from adamerge_jax.runs.rows import Row
from adamerge_jax.runs.without_experts import read_without_experts, write_without_experts

MERGE = Row("learned (tensor)", {"cat": 0.8, "dog": 0.6}, kind="learned")
ROWS = [
    Row(name, {"cat": 0.1, "dog": 0.9}, kind="learned")
    for name in ("cat", 'dog [red]\n"')  # names are strangers'
]


def test_it_is_read_as_it_was_written(tmp_path: Path):
    write_without_experts(ROWS, tmp_path / "file.json")
    assert read_without_experts(tmp_path / "file.json", MERGE) == ROWS
    assert read_without_experts(tmp_path / "none.json", MERGE) == []


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"rows": 3}, "list"),
        ({"rows": [{}]}, "method"),
        ({"rows": [ROWS[0].as_json() | {"tasks": {"cat": 0.5}}]}, "other tasks"),
        ({"rows": [ROWS[0].as_json() | {"metric": "loss"}]}, "another metric"),
        ({"rows": [ROWS[0].as_json() | {"metric": "beauty"}]}, "metric"),
    ],
)
def test_others_are_refused(changed: dict[str, Any], reason: str, tmp_path: Path):
    file = tmp_path / "file.json"
    file.write_text(json.dumps(changed))
    with pytest.raises(InputError, match=rf"file\.json: .*{reason}"):
        read_without_experts(file, MERGE)


def test_rows_without_a_table_are_refused(tmp_path: Path):
    write_without_experts(ROWS, tmp_path / "file.json")
    with pytest.raises(InputError, match="take it from the run again"):
        read_without_experts(tmp_path / "file.json", None)
