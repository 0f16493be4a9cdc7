import json
import time

import pytest

from adamerge_jax.runs import record as run_record
from adamerge_jax.runs.record import RunRecord


def test_times_of_phases_add_up(tmp_path):
    (tmp_path / "recipe.yaml").touch()
    record = RunRecord(tmp_path)
    with record.phase("learning"):
        time.sleep(0.02)
    again = RunRecord(tmp_path)
    with pytest.raises(KeyboardInterrupt), again.phase("learning"):
        time.sleep(0.03)
        raise KeyboardInterrupt
    again.add(device="a chip")
    found = json.loads((tmp_path / "run.json").read_text())
    assert 0.05 <= found["seconds"]["learning"] < 5
    assert found["device"] == "a chip"
    assert found["peak_memory_bytes"]["process"] > 10**7


def test_a_record_is_replaced_and_not_written_over(tmp_path):
    """Whenever a run is killed, there is a whole record to go on with."""
    (tmp_path / "recipe.yaml").touch()
    record = RunRecord(tmp_path)
    record.add(device="a chip")
    before = tmp_path / "before.json"
    before.hardlink_to(tmp_path / "run.json")
    record.add(device="another chip", note="\N{EN DASH}")
    assert json.loads(before.read_text())["device"] == "a chip"
    found = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert (found["device"], found["note"]) == ("another chip", "\N{EN DASH}")
    assert {file.name for file in tmp_path.iterdir()} == {
        "before.json",
        "recipe.yaml",
        "run.json",
    }


def test_nothing_is_written_before_the_recipe_is_there(tmp_path):
    folder = tmp_path / "run"
    record = RunRecord(folder)
    with record.phase("opening"):
        pass
    assert not folder.exists()
    folder.mkdir()
    with record.phase("opening"):
        pass
    assert not any(folder.iterdir())
    (folder / "recipe.yaml").touch()
    with record.phase("learning"):
        pass
    assert json.loads((folder / "run.json").read_text())["seconds"].keys() == {
        "opening",
        "learning",
    }


@pytest.mark.parametrize(
    ("peak", "expected"), [({"process": 5}, 5), ({"process": 5, "device": 3}, 3)]
)
def test_arrays_lie_on_the_device_where_it_has_memory_of_its_own(
    monkeypatch: pytest.MonkeyPatch, peak: dict[str, int], expected: int
):
    monkeypatch.setattr(run_record, "peak_memory", lambda: peak)
    assert run_record.peak_memory_of_arrays() == expected
