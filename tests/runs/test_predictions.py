"""The file of predictions, read as it was written and refused where it was changed."""

import json

import pytest

from adamerge_jax.errors import InputError
from adamerge_jax.runs.predictions import (
    Difference,
    Mistake,
    TaskPredictions,
    read_predictions,
    write_predictions,
)

PETS = TaskPredictions(
    class_names=["cat", "dog"],
    counts=[Mistake(label=0, merge=0, count=7), Mistake(label=1, merge=-1, count=1)],
    differing=1,
    expert_alone_right=1,
    differences=[Difference(index=7, label=1, expert=1, merge=-1, text="woof", image="iVBORw0=")],
)


def test_it_is_read_as_it_was_written(tmp_path):
    write_predictions({"pets": PETS}, tmp_path / "predictions.json")
    assert read_predictions(tmp_path / "predictions.json") == {"pets": PETS}
    assert read_predictions(tmp_path / "none.json") == {}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("counts", 0, "label"), 2),
        (("differences", 0, "merge"), 5),
        (("counts", 0, "count"), -1),
        (("counts", 0, "count"), 1e300),
        (("differences", 0, "image"), "x' onerror='alert(1)"),
        (("differences", 0, "text"), 3),
        (("class_names",), "cat"),
        (("more",), 1),
    ],
)
def test_what_no_run_has_written_is_refused(path, value, tmp_path):
    file = tmp_path / "predictions.json"
    write_predictions({"pets": PETS}, file)
    fields = json.loads(file.read_text())
    place = fields["pets"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(fields))
    with pytest.raises(InputError) as caught:
        read_predictions(file)
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)
