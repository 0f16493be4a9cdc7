import json
from pathlib import Path

import pytest

from adamerge_jax.errors import InputError
from adamerge_jax.runs.front import Front
from tests.report.saved_runs import FRONT


@pytest.fixture
def file(tmp_path: Path) -> Path:
    FRONT.write(tmp_path / "front.json")
    return tmp_path / "front.json"


def test_a_front_is_read_as_it_was_written(file: Path):
    assert Front.read(file) == FRONT
    assert Front.read(file.parent / "none") is None


def test_the_best_points_are_by_the_mean():
    assert FRONT.best == 1
    assert FRONT.best_single == (0.5, {"cat": 0.6, "dog": 0.7})


@pytest.mark.parametrize(
    "damage",
    [
        {"points": []},
        {"singles": []},
        {"experts": {}},
        {"experts": {"cat": 0.9}},
        {"others": [{"cat": 0.1, "bird": 0.1}]},
        {"others": [{"cat": float("nan"), "dog": 0.1}]},
        {"singles": [[1e300, {"cat": 0.1, "dog": 0.1}]]},
        {"score": 5},
        {"fits": {"cat": {"error": "x"}}},
        {"points": [{"file": "01.safetensors"}]},
    ],
)
def test_damaged_fronts_are_refused(file: Path, damage: dict):
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    with pytest.raises(InputError, match=r"front.json: .*"):
        Front.read(file)
