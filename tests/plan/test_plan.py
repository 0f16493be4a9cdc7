"""Plans: the sizes of what a merge really holds, from headers alone."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from adamerge_jax.checkpoints import fingerprint, safetensors_file
from adamerge_jax.cli import main as cli
from adamerge_jax.errors import InputError
from adamerge_jax.models.token_rows import PLACES, SLOTS
from adamerge_jax.pipeline.learn import ask_experts, prepare
from adamerge_jax.pipeline.workspace import open_workspace
from adamerge_jax.plan import hardware, make_plan
from adamerge_jax.plan.memory import Memory
from adamerge_jax.plan.mixing_time import Mixing
from adamerge_jax.plan.outline import outline
from adamerge_jax.plan.work import BESIDE_THE_TRACE, work_of
from adamerge_jax.recipes.build import build
from adamerge_jax.recipes.loading import parse_recipe
from tests.adapter_references import save_experts
from tests.references import learning_inputs, write_json_lines, write_recipe


class HeaderOnly:
    """A safetensors file that says shapes and dtypes; reading a value of it is an error."""

    def __init__(self, file: Any, **options: Any):
        self._file = safe_open(file, **options)

    def __enter__(self) -> "HeaderOnly":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def keys(self) -> list[str]:
        return self._file.keys()


@pytest.fixture
def no_weights(monkeypatch):
    """Every way to a weight is closed."""

    def refuse(stream, name, *arguments):
        raise AssertionError(f"{name} is read")

    monkeypatch.setattr(safetensors_file, "safe_open", HeaderOnly)
    for module in (safetensors_file, fingerprint):
        monkeypatch.setattr(module, "read_entries", refuse)


def test_no_weight_is_read(text_recipe, tmp_path, no_weights, capsys):
    recipe = str(write_recipe(tmp_path, text_recipe))
    cli.main(["plan", recipe])
    printed = capsys.readouterr().out
    assert "fits: peak" in printed
    assert "task vectors of 3 experts" in printed
    # What shows that the way is closed: learning cannot go it.
    with pytest.raises(SystemExit):
        cli.main(["learn", recipe, "--out", str(tmp_path / "run")])
    assert "is read" in capsys.readouterr().err


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, np.dtype(leaf.dtype)), tree)


ROW = {"granularity": "row"}
ALIGNMENT = [{"name": "logit_alignment", "options": {"cross_task": 0.1}}]


@pytest.mark.parametrize(
    "changes",
    [
        {"objectives": ALIGNMENT, "coefficients": ROW},
        {
            "dtype": "bfloat16",
            "coefficients": {"granularity": "chunk", "granularity_options": {"pieces": 5}},
        },
        {"coefficients": {"granularity": "partition", "granularity_options": {"groups": 3}}},
        {"coefficients": {"granularity": "singular", "granularity_options": {"rank": 2}}},
        {"task_vectors": {"dtype": "int4"}, "learning": {"steps": 1, "batch_size": 4}},
        {
            "objectives": [{"name": "hidden_state_alignment", "options": {"layers": [1, -1]}}],
            "interference": [{"name": "trim", "options": {"density": 0.5}}],
        },
    ],
)
def test_abstract_arrays_are_those_of_the_merge(text_recipe, tmp_path, changes):
    check_arrays(text_recipe | changes, tmp_path)


def test_abstract_images(image_recipe, tmp_path):
    check_arrays(image_recipe | {"objectives": ALIGNMENT}, tmp_path)


@pytest.mark.parametrize(
    "coefficients", [ROW, {"granularity": "partition", "granularity_options": {"groups": 3}}]
)
def test_abstract_adapters(tmp_path, coefficients):
    fields, _ = save_experts("vit", tmp_path)
    for task, own in fields["tasks"].items():
        pixels = np.zeros((12, 3, 8, 8), np.float32)
        np.savez(tmp_path / f"{task}.npz", pixel_values=pixels)
        own["calibration"] = str(tmp_path / f"{task}.npz")
    learning = {"batch_size": 4}
    check_arrays(fields | {"coefficients": coefficients, "learning": learning}, tmp_path)


def check_arrays(fields: dict[str, Any], root: Any) -> None:
    """Compares what the plan takes for the arrays with what a merge loads."""
    recipe = parse_recipe(fields)
    found = outline(recipe, root)
    workspace = open_workspace(recipe, root)
    inputs = prepare(build(recipe, workspace.models), workspace)
    assert shapes_of(found.base) == shapes_of(inputs.base)
    assert shapes_of(found.head_parameters) == shapes_of(workspace.heads)
    # The plan cannot know that an expert left a tensor as it was.
    changed = list(inputs.deltas)
    assert set(changed) <= set(found.deltas)
    assert shapes_of({name: found.deltas[name] for name in changed}) == shapes_of(inputs.deltas)
    granularity = inputs.method.result.granularity.make(inputs.shapes)
    prepared = {name: granularity.prepare(name, delta) for name, delta in inputs.deltas.items()}
    planned = found.learning().frozen.deltas
    assert shapes_of({name: planned[name] for name in changed}) == shapes_of(prepared)
    real = next(inputs.calibration.batches())
    length = real.inputs["input_ids"].shape[1] if "input_ids" in real.inputs else 0
    planned = found.batch(length)
    for name in (SLOTS, PLACES):  # `prepare` packs no texts
        planned.inputs.pop(name, None)
    assert shapes_of(planned) == shapes_of(real)


def test_work_of_a_scan_of_products():
    def run(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    work = work_of(run, jnp.ones((4, 8)), jnp.ones((3, 8, 8)))
    assert work.flops == 3 * 2 * 4 * 8 * 8
    array = 4 * 8 * 4
    assert array <= work.kept_bytes / BESIDE_THE_TRACE <= 4 * array
    # The gradient keeps every layer's input.
    gradient = work_of(
        jax.grad(lambda x, w: run(x, w).sum()), jnp.ones((4, 8)), jnp.ones((3, 8, 8))
    )
    assert gradient.flops == pytest.approx(2 * work.flops, rel=0.01)
    assert gradient.kept_bytes > work.kept_bytes + 2 * array


def device(monkeypatch, memory: int) -> str:
    """Gives a device of the table so much memory."""
    monkeypatch.setitem(hardware.DEVICES, "h100", hardware.DEVICES["h100"]._replace(memory=memory))
    return "h100"


def test_what_to_change(text_recipe, tmp_path, monkeypatch, no_weights):
    text_recipe["learning"] |= {"batch_size": 16}
    text_recipe["evaluation"] = {"batch_size": 8}
    recipe = parse_recipe(text_recipe)
    plan = make_plan(recipe, tmp_path, device(monkeypatch, 10**9))
    assert plan.fits and not plan.changes
    peak = plan.peak
    held = plan.memory.parts["base"] + plan.memory.parts["task vectors of 3 experts"]
    plan = make_plan(recipe, tmp_path, device(monkeypatch, int(held + 0.4 * (peak - held))))
    assert not plan.fits
    assert plan.changes[-1].fits
    assert not any(change.fits for change in plan.changes[:-1])
    peaks = [change.peak for change in plan.changes]
    assert peaks == sorted(peaks, reverse=True)
    # As advised, it fits.
    fields = recipe.model_dump()
    for change in plan.changes:
        section, _, name = change.field.rpartition(".")
        (fields[section] if section else fields)[name] = change.value
    assert make_plan(parse_recipe(fields), tmp_path, "h100").fits


def test_the_fastest_that_fits_is_advised(text_recipe, tmp_path, monkeypatch, no_weights):
    """Rounding is quicker than moving task vectors over the link, where it is enough."""
    text_recipe["evaluation"] = {"batch_size": 2}
    text_recipe["learning"] |= {"batch_size": 2, "rematerialize": "layer"}
    recipe = parse_recipe(text_recipe)
    plan = make_plan(recipe, tmp_path, "h100")
    task_vectors = plan.memory.parts["task vectors of 3 experts"]
    advised = []
    for share in (0.3, 0.05):
        memory = int(plan.peak - (1 - share) * task_vectors)
        changes = make_plan(recipe, tmp_path, device(monkeypatch, memory)).changes
        assert changes[-1].fits
        advised.append({change.field: change.value for change in changes})
    assert advised[0] in [{"task_vectors.dtype": dtype} for dtype in ("int8", "int4")]
    assert advised[1]["task_vectors.memory"] == "host"
    assert "max_length" not in advised[1]


def test_task_vectors_are_read_at_the_speed_of_their_place():
    device = hardware.DEVICES["h100"]
    part = Mixing(10**9, 10**8, "host", parts=4, once=False, recomputed=True)
    assert part.seconds(device) == pytest.approx(3 * 4 * 10**9 / 64e9)
    once = part._replace(once=True)
    assert once.seconds(device) == pytest.approx(2 * 10**9 / 64e9, rel=0.2)
    here = part._replace(place="device")
    assert here.seconds(device) == pytest.approx(3 * 4 * 10**9 / (0.4 * 3350e9))


def test_the_table_of_results_takes_time(text_recipe, tmp_path):
    def results(**evaluation: Any) -> float:
        recipe = parse_recipe(text_recipe | {"evaluation": evaluation})
        return make_plan(recipe, tmp_path, "h100").seconds.results

    merge = results(baselines="none")
    assert merge > 0
    # Experts and task arithmetic; the base and the average.
    assert results(baselines="quick") == pytest.approx(3 * merge)
    assert results() == pytest.approx(5 * merge)
    for task in text_recipe["tasks"].values():
        del task["test"]
    assert results() == 0


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda process: {3}, raising=False)
    assert hardware.usable_cores() == 1


def test_nothing_helps(text_recipe, tmp_path, monkeypatch, capsys, no_weights):
    text_recipe["learning"] |= {"batch_size": 2, "rematerialize": "layer"}
    small = {"evaluation": {"batch_size": 2}, "max_length": 32}
    recipe = write_recipe(tmp_path, text_recipe | small)
    cli.main(["plan", str(recipe), "--device", device(monkeypatch, 1000)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "does not fit" in printed
    assert "not enough yet" in printed
    assert "dtype: bfloat16" in printed


def test_rematerialising_and_half_precision_take_less(text_recipe, tmp_path):
    def activations(**changes: Any) -> int:
        plan = make_plan(parse_recipe(text_recipe | changes), tmp_path, "h100")
        return plan.memory.parts["activations of a step"]

    by_choice = {
        choice: activations(learning=text_recipe["learning"] | {"rematerialize": choice})
        for choice in ("layer", "elementwise", "nothing")
    }
    assert by_choice["layer"] < by_choice["elementwise"] < by_choice["nothing"]
    assert activations(dtype="bfloat16") < 0.9 * by_choice["elementwise"]


def test_an_expert_takes_its_place_while_it_is_asked(text_recipe, tmp_path):
    """A whole model as much as the base; an adapter shares the base and brings its factors."""

    def parts(fields: dict[str, Any], root: Any) -> dict[str, int]:
        return make_plan(
            parse_recipe(fields | {"objectives": ALIGNMENT}), root, "h100"
        ).memory.parts

    whole = parts(text_recipe, tmp_path)
    assert whole["one expert while it is asked"] == whole["base"]
    fields, _ = save_experts("vit", tmp_path)
    for task in fields["tasks"].values():
        np.savez(tmp_path / "pixels.npz", pixel_values=np.zeros((40, 3, 8, 8), np.float32))
        task["calibration"] = str(tmp_path / "pixels.npz")
    adapter = parts(fields, tmp_path)
    assert 0 < adapter["one expert while it is asked"] < adapter["base"]


def test_a_merge_that_learning_starts_from_is_in_the_plan(text_recipe, tmp_path):
    """It is as large as the merged part of the base, and its steps see all task vectors."""

    def memory(coefficients: dict[str, Any]) -> Memory:
        recipe = parse_recipe(text_recipe | {"coefficients": coefficients})
        plan = make_plan(recipe, tmp_path, "h100")
        merges = [note for note in plan.notes if "initial_merge" in note]
        assert len(merges) == ("initial_merge" in coefficients)
        return plan.memory

    plain = memory({"constraint": "free"})
    start = memory({"constraint": "free", "initial_merge": {"name": "ties"}})
    size = start.parts["merge by ties that learning starts from"]
    assert 0.9 * plain.parts["base"] < size <= plain.parts["base"]
    before, after = ({p.name: p for p in m.phases}["learning"].device for m in (plain, start))
    assert after - before == size
    fitting = start.phases[0]
    assert fitting.name == "fitting the first merge" and fitting.host > 3 * size
    making = memory({"constraint": "free", "initial_merge": {"name": "regmean"}}).phases[0]
    assert making.name == "making the first merge" and making.device > 4 * size


def test_task_vectors_elsewhere_and_batches_in_parts(text_recipe, tmp_path):
    def plan(**changes: Any) -> Any:
        return make_plan(parse_recipe(text_recipe | changes), tmp_path, "h100")

    def memory(**changes: Any) -> Any:
        return plan(**changes).memory

    def at(found: Any, place: str) -> int:
        return next(getattr(each, place) for each in found.phases if each.name == "learning")

    here, host, disk = (
        memory(task_vectors={"memory": place}) for place in ("device", "host", "disk")
    )
    moved = here.parts["task vectors of 3 experts"]
    assert at(here, "device") - moved == at(host, "device") == at(disk, "device")
    assert at(host, "host") - moved == at(here, "host") == at(disk, "host")
    in_parts = plan(learning=text_recipe["learning"] | {"microbatches": 4, "mix": "part"})
    name = "activations of a step"
    assert in_parts.memory.parts[name] < 0.6 * here.parts[name]
    # As much work, of which one part is traced, but for the mix in each part.
    halves = plan(learning=text_recipe["learning"] | {"microbatches": 2, "mix": "part"})
    assert 1 < in_parts.programs.step.flops / halves.programs.step.flops < 1.1
    # What is split, beside a weight that is gathered and its gradient.
    weights = load_file(Path(text_recipe["base"]) / "model.safetensors").values()
    gathered = 2 * max(weight.nbytes for weight in weights)
    assert at(memory(devices={"model": 2}), "device") - gathered < 0.6 * at(here, "device")


def test_data_that_is_elsewhere_is_assumed(text_recipe, tmp_path, capsys):
    for own in text_recipe["tasks"].values():
        del own["test"]
        own["calibration"] = {"path": "some/where", "limit": 70}
    text_recipe["max_length"] = 24
    recipe = write_recipe(tmp_path, text_recipe)
    cli.main(["plan", str(recipe), "--device", "a100"])
    printed = capsys.readouterr().out
    assert "70 examples of max_length tokens are assumed" in printed
    found = outline(parse_recipe(text_recipe), tmp_path)
    assert found.longest == 24
    assert len(found.data["calibration"]["tone"]) == 70


def test_bad_input(text_recipe, image_recipe, tmp_path):
    recipe = parse_recipe(text_recipe)
    with pytest.raises(InputError, match="'h101' is none of cpu, h100"):
        make_plan(recipe, tmp_path, "h101")
    np.savez(tmp_path / "pictures.npz", pictures=np.zeros(3))
    image_recipe["tasks"]["shape"]["calibration"] = "pictures.npz"
    with pytest.raises(InputError, match=re.escape("no .npz file with 'pixel_values'")):
        make_plan(parse_recipe(image_recipe), tmp_path, "h100")


@pytest.mark.parametrize(
    ("kind", "array", "message"),
    [
        ("image", np.zeros(()), "the arrays of .*a.npz differ in their number of examples"),
        ("image", np.zeros((0, 3, 8, 8)), "a.npz has no examples"),
        ("text", np.zeros(5, int), r"a.npz: token arrays have the shapes input_ids \(5,\)"),
    ],
)
def test_arrays_that_are_no_examples(text_recipe, image_recipe, tmp_path, kind, array, message):
    recipe, task, name = text_recipe, "tone", "input_ids"
    if kind == "image":
        recipe, task, name = image_recipe, "shape", "pixel_values"
    np.savez(tmp_path / "a.npz", **{name: array})
    recipe["tasks"][task]["calibration"] = "a.npz"
    # Learning says the same.
    for opened in (outline, open_workspace):
        with pytest.raises(InputError, match=f"^calibration data of task '{task}': .*{message}"):
            opened(parse_recipe(recipe), tmp_path)


def test_nothing_to_merge(text_recipe, tmp_path):
    recipe = parse_recipe(text_recipe | {"keep_from_base": ["*"]})
    with pytest.raises(InputError) as of_plan:
        make_plan(recipe, tmp_path, "h100")
    with pytest.raises(InputError, match="no expert differs from the base") as of_learning:
        learning_inputs(recipe, tmp_path)
    assert str(of_plan.value) == str(of_learning.value)


@pytest.mark.parametrize(("every", "ratio"), [(None, (4 + 13) / 4), (2, (3 + 7) / 3)])
def test_coarse_coefficients_take_time_too(text_recipe, tmp_path, every, ratio):
    text_recipe["learning"] |= {"steps": 3, "evaluate_every": every}

    def seconds(**coefficients: Any) -> Any:
        recipe = parse_recipe(text_recipe | {"coefficients": coefficients})
        return make_plan(recipe, tmp_path, "h100").seconds

    alone, after = seconds(), seconds(coarse={"steps": 12})
    assert after.held_out_evaluations == pytest.approx(ratio * alone.held_out_evaluations)
    assert after.steps == pytest.approx(5 * alone.steps)


def test_copies_are_asked_about_and_heads_fitted_to_them(text_recipe, tmp_path):
    """The initial coefficient is chosen by evaluations of the held-out data."""

    def plan(copies: int = 0, **changes: Any) -> Any:
        learning = text_recipe["learning"] | {"steps": 200, "copies": copies}
        fields = text_recipe | {"objectives": ALIGNMENT, "learning": learning} | changes
        return make_plan(parse_recipe(fields), tmp_path, "h100")

    plain, copied = plan(), plan(copies=3)
    assert copied.seconds.expert_targets == pytest.approx(4 * plain.seconds.expert_targets)
    assert copied.seconds.steps == plain.seconds.steps
    by_plan = [p.memory.parts["expert targets (host)"] for p in (plain, copied)]
    assert by_plan[1] == 4 * by_plan[0]
    assert plain.seconds.head_fits == copied.seconds.head_fits == 0
    fitted, both = plan(heads="refitted"), plan(copies=3, heads="refitted")
    assert fitted.seconds.head_fits > 0
    assert both.seconds.head_fits == pytest.approx(4 * fitted.seconds.head_fits)
    assert "changing copies" in both.notes[-1] and "fitting heads" in both.notes[-1]
    assert "copies" not in plain.notes[-1] and "heads" not in plain.notes[-1]
    free = {"constraint": "free"}
    fixed = plan(coefficients=free | {"initial": 0.3}).seconds.held_out_evaluations
    chosen = plan(coefficients=free | {"initial": "auto"}).seconds.held_out_evaluations
    assert chosen == pytest.approx((11 + 4) / 11 * fixed)


def test_lengths_are_those_of_the_texts(text_recipe, tmp_path):
    rows = [{"text": "a " * count} for count in (3, 20, 27)] * 4
    text_recipe["tasks"]["tone"]["calibration"] = str(write_json_lines(tmp_path / "t.jsonl", rows))
    found = outline(parse_recipe(text_recipe), tmp_path)
    # With the two special tokens: 5, 22 and 29, padded to buckets.
    assert sorted(set(found.data["calibration"]["tone"].lengths)) == [16, 24, 32]
    assert found.longest == 32
    assert found.batch(32).inputs["input_ids"].shape == (3 * 4, 32)


def test_texts_of_a_step_are_packed_as_in_a_run(text_recipe, tmp_path):
    for number, task in enumerate(text_recipe["tasks"].values()):
        rows = [{"text": "a " * count} for count in (3, 4, 5, 27)] * 8
        task["calibration"] = str(write_json_lines(tmp_path / f"{number}.jsonl", rows))
    text_recipe["learning"] |= {"batch_size": 8}
    recipe = parse_recipe(text_recipe)
    found = outline(recipe, tmp_path)
    workspace = open_workspace(recipe, tmp_path)
    inputs = ask_experts(prepare(build(recipe, workspace.models), workspace))
    packed, planned = inputs.calibration.packing, found.packing
    assert packed is not None and planned is not None
    # Each is made for sixteen batches of its own.
    assert planned.length == packed.length and abs(planned.rows - packed.rows) <= 1
    real = next(inputs.calibration.batches()).inputs
    abstract = found.batch(found.longest).inputs
    assert set(abstract) == set(real)
    assert abstract[PLACES].shape == real[PLACES].shape
    assert abstract[SLOTS].shape == (planned.rows, planned.length)
    # Nothing else is packed, so that its tokens are not counted.
    assert all(size.tokens is None for size in found.data["test"].values())
    # No text is packed by parts of a batch.
    assert found.changed("learning.microbatches", 2).packing is None
