"""Fields that a run picks so that it fits a device, whose memory is made up here."""

import json
from typing import Any

import pytest
import yaml

from adamerge_jax.cli import main as cli
from adamerge_jax.errors import InputError
from adamerge_jax.plan import automatic, hardware, make_plan, pick_fields
from adamerge_jax.recipes.loading import parse_recipe
from adamerge_jax.recipes.schema import AUTOMATIC_FIELDS, PICKED_WITH_THEM
from adamerge_jax.runs.files import STATE_FOLDER
from tests.references import write_recipe

AUTO = {"learning": dict.fromkeys(("batch_size", "microbatches", "rematerialize"), "auto")} | {
    "task_vectors": {"memory": "auto"}
}


@pytest.fixture
def fields(text_recipe) -> dict[str, Any]:
    """A recipe that leaves all to the run but a small evaluation."""
    learning = text_recipe["learning"] | AUTO["learning"]
    return text_recipe | AUTO | {"learning": learning, "evaluation": {"batch_size": 2}}


def give_memory(monkeypatch, memory: int) -> None:
    device = hardware.DEVICES["h100"]._replace(memory=memory)
    monkeypatch.setattr(automatic, "find_device", lambda name: device)


def give_accelerator(monkeypatch) -> None:
    monkeypatch.setattr(automatic.jax, "default_backend", lambda: "gpu")


def test_auto_is_the_default_where_that_fits(fields, tmp_path, monkeypatch):
    give_memory(monkeypatch, 10**9)
    recipe = parse_recipe(fields)
    picks = pick_fields(recipe, tmp_path)
    assert picks.fields == {
        "learning.batch_size": 16,
        "learning.microbatches": 1,
        "learning.rematerialize": "elementwise",
        "task_vectors.memory": "device",
    }
    assert "learning.microbatches: 1" in picks.line and "1.0 GB on NVIDIA H100" in picks.line
    assert picks.applied_to(recipe).model_dump() == recipe.model_dump()


def test_what_is_picked_fits(fields, tmp_path, monkeypatch):
    recipe = parse_recipe(fields)
    plan = make_plan(recipe, tmp_path, "h100")
    base = plan.memory.parts["base"]
    memory = int(base + 0.3 * (plan.peak - base))
    give_memory(monkeypatch, memory)
    picks = pick_fields(recipe, tmp_path)
    assert set(AUTOMATIC_FIELDS) <= set(picks.fields) <= {*AUTOMATIC_FIELDS, "learning.mix"}
    assert "does not fit" not in picks.line
    monkeypatch.setitem(hardware.DEVICES, "h100", automatic.find_device(None))
    assert make_plan(picks.applied_to(recipe), tmp_path, "h100").fits


def test_only_what_is_open_is_picked(fields, tmp_path, monkeypatch):
    fields["learning"] |= {"rematerialize": "nothing", "batch_size": 4, "mix": "step"}
    give_memory(monkeypatch, 1000)
    picks = pick_fields(parse_recipe(fields), tmp_path)
    assert set(picks.fields) == {"learning.microbatches", "task_vectors.memory"}
    assert "does not fit; adamerge plan names further changes" in picks.line


def test_a_processor_picks_nothing_unasked_and_an_accelerator_does(
    text_recipe, tmp_path, monkeypatch
):
    for field in (*AUTOMATIC_FIELDS, *PICKED_WITH_THEM):
        section, _, name = field.partition(".")
        text_recipe.get(section, {}).pop(name, None)
    recipe = parse_recipe(text_recipe)
    give_memory(monkeypatch, 10**9)
    assert pick_fields(recipe, tmp_path).fields == {}
    give_accelerator(monkeypatch)
    assert set(pick_fields(recipe, tmp_path).fields) == {*AUTOMATIC_FIELDS}
    said = parse_recipe(recipe.model_dump())
    assert pick_fields(said, tmp_path).fields == {}


def test_a_device_of_which_nothing_is_known(fields, text_recipe, tmp_path, monkeypatch):
    def refuse(name: None) -> None:
        raise InputError("--device: nothing is known of 'X'")

    give_accelerator(monkeypatch)
    monkeypatch.setattr(automatic, "find_device", refuse)
    with pytest.raises(InputError, match="batch_size: is auto, and --device: nothing is known"):
        pick_fields(parse_recipe(fields), tmp_path)
    unasked = pick_fields(parse_recipe(text_recipe), tmp_path)
    assert unasked.fields == {} and "nothing is picked" in unasked.line


def test_a_run_records_what_it_picked_and_goes_on_with_it(fields, tmp_path, monkeypatch, capsys):
    fields["learning"] |= {"steps": 2, "batch_size": 4}
    for task in fields["tasks"].values():
        del task["test"]
    recipe = parse_recipe(fields)
    plan = make_plan(recipe, tmp_path, "h100")
    held = plan.memory.parts["base"] + plan.memory.parts["task vectors of 3 experts"]
    give_memory(monkeypatch, int(held + 0.6 * (plan.peak - held)))
    file, out = str(write_recipe(tmp_path, fields)), tmp_path / "run"
    cli.main(["learn", file, "--out", str(out), "--task-vectors.memory", "device"])
    assert capsys.readouterr().out.count("picked by the plan: learning.microbatches: ") == 1
    picked = json.loads((out / "run.json").read_text())["picked"]
    assert "task_vectors.memory" not in picked  # the command line says it
    written = yaml.safe_load((out / "recipe.yaml").read_text())
    for field, value in picked.items():
        section, _, name = field.partition(".")
        assert written[section][name] == value
    # Killed before its end: it goes on with the same, on a device with more memory too.
    (out / STATE_FOLDER).mkdir()
    give_memory(monkeypatch, 10**12)
    arguments = ["learn", file, "--out", str(out), "--task-vectors.memory", "device", "--resume"]
    cli.main(arguments)
    assert yaml.safe_load((out / "recipe.yaml").read_text()) == written


@pytest.mark.parametrize("field", PICKED_WITH_THEM)
def test_other_fields_are_not_automatic(text_recipe, field):
    section, _, name = field.partition(".")
    with pytest.raises(InputError, match=name):
        parse_recipe(text_recipe | {section: {name: "auto"}})
