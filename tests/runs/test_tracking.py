import json
from importlib.util import find_spec

import pytest

from adamerge_jax.cli import main as cli
from adamerge_jax.errors import InputError
from adamerge_jax.runs import tracking
from adamerge_jax.runs.tracking import flatten, require_installed, track
from tests.references import read_events, write_recipe

RECORD = {
    "step": 3,
    "objective": {"cat": 0.5, "dog": 0.25},
    "held_out": None,
    "agreement": {"cat": None, "dog": 0.75},
    "seconds": 0.125,
}
NUMBERS = {"objective/cat": 0.5, "objective/dog": 0.25, "agreement/dog": 0.75, "seconds": 0.125}


def test_flatten():
    assert flatten(RECORD) == NUMBERS


def test_tensorboard_shows_stages_as_runs(tmp_path):
    for stage, steps in {"coarse": [3], "learning": [3, 4]}.items():
        with track(["tensorboard"], tmp_path, stage, {"name": "pets"}) as send:
            for step in steps:
                send(RECORD | {"step": step})
    expected = pytest.approx(NUMBERS)
    assert read_events(tmp_path / "tensorboard" / "coarse") == {3: expected}
    assert read_events(tmp_path / "tensorboard" / "learning") == {3: expected, 4: expected}


def test_wandb_gets_the_numbers(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with track(["wandb"], tmp_path, "learning", {"name": "pets", "seed": 7}) as send:
        send(RECORD)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    for name, value in NUMBERS.items():
        assert name.encode() in content
        assert json.dumps(value).encode() in content
    assert b"pets" in content


def test_a_tracker_that_is_not_installed(image_recipe, tmp_path, monkeypatch, capsys):
    """Nothing is opened or written before the message."""
    monkeypatch.setattr(
        tracking, "find_spec", lambda name: None if name == "wandb" else find_spec(name)
    )
    image_recipe["tracking"] = ["wandb"]
    recipe = write_recipe(tmp_path, image_recipe)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["learn", str(recipe), "--out", str(tmp_path / "run")])
    assert stopped.value.code == 2
    assert "pip install 'adamerge_jax[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="tracking: wandb needs the package wandb"):
        require_installed(["tensorboard", "wandb"])
