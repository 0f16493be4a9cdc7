"""The same recipe on one device, on eight, and on those of two processes."""

import json
import os
import platform
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
from jax.sharding import PartitionSpec

from adamerge_jax.checkpoints.orbax import load_parameters
from adamerge_jax.cli import main as cli
from adamerge_jax.coefficients.file import Coefficients
from adamerge_jax.devices import ONE_DEVICE, Devices, open_devices, return_freed_memory
from adamerge_jax.errors import InputError
from adamerge_jax.pipeline.learn import learn_coefficients
from adamerge_jax.recipes.loading import parse_recipe
from tests.adapter_references import letter_tokenizer, save_experts
from tests.references import (
    WITHOUT_FIGURES,
    WITHOUT_PYTORCH,
    learning_inputs,
    sentences,
    write_json_lines,
    write_recipe,
)

LEARNING = dict(
    steps=4,
    copies=0,
    batch_size=4,
    # Rounding decides on the sign of a gradient that is almost 0, and Adam would make whole steps
    # of it; a large eps leaves it as small as it is.
    optimizer=dict(name="adam", learning_rate=0.01, options=dict(eps=1e-3)),
)

LEARN = """
import json, sys
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adamerge_jax import CONSTRAINTS, Frozen, granularities, materialize, task_vectors
from adamerge_jax.data.batches import Batch
from adamerge_jax.devices import ONE_DEVICE, open_devices
from adamerge_jax.objectives import Targets, TaskOutputs, hidden_state_alignment
from adamerge_jax.parameter_names import is_stacked
from adamerge_jax.pipeline import learn as stage
from adamerge_jax.pipeline.workspace import open_workspace
from adamerge_jax.recipes.build import build
from adamerge_jax.recipes.loading import load_recipe
from experiments.benchmarks.collectives import collectives

programs, make_learner = [], stage.make_learner


def make_read_learner(*arguments, **options):
    learner, compiled = make_learner(*arguments, **options), {}

    def step(*arguments):
        form = str(jax.tree.map(jnp.shape, arguments))
        if form not in compiled:
            compiled[form] = learner.step.lower(*arguments).compile()
            programs.append(collectives(compiled[form].as_text()))
        return compiled[form](*arguments)

    return learner._replace(step=step)


def learn(inputs):
    return stage.learn_coefficients(
        inputs, show_stage=lambda *what: nullcontext(lambda progress: None)
    )


stage.make_learner = make_read_learner
*folders, in_float64 = map(Path, sys.argv[1:])
for folder in folders:
    recipe = load_recipe(folder / "recipe.yaml")
    devices = open_devices(**recipe.devices.model_dump())
    workspace = open_workspace(recipe, folder, devices)
    inputs = stage.prepare(build(recipe, workspace.models), workspace)
    programs.clear()
    merge = learn(inputs)
    merge.coefficients.save(folder / "coefficients.safetensors")
    layers = {}  # bytes of a layer's part of each parameter that is split
    for name, array in inputs.base.items():
        part = array.addressable_shards[0].data
        if part.size < array.size:
            depth = array.shape[0] if is_stacked(name) else 1
            layers[name] = (array.nbytes // depth, depth)
    learned = (dict(merge.values), merge.heads)
    facts = {
        "devices": str(devices),
        "parts": {n: a.addressable_shards[0].data.shape for n, a in inputs.base.items()},
        "layers": layers,
        "mixed": list(inputs.deltas),
        "tasks": len(recipe.tasks),
        "learned": sum(np.size(array) for array in jax.tree.leaves(learned)),
        "programs": programs,
    }
    (folder / "facts.json").write_text(json.dumps(facts))

# Nothing but the order of sums may differ between devices: in float64 it has no weight.
stage.make_learner = make_learner
jax.config.update("jax_enable_x64", True)
jnp.float32 = jnp.float64


def wide(tree):
    return jax.tree.map(
        lambda a: a.astype(float) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree
    )


recipe = load_recipe(in_float64)
one = None
for devices in (ONE_DEVICE, open_devices(model=4)):
    workspace = open_workspace(recipe, Path("/"), devices)
    inputs = stage.prepare(build(recipe, workspace.models), workspace)
    base = wide(inputs.base)
    inputs = inputs._replace(base=base, theta_start=base, deltas=wide(inputs.deltas))
    values = np.concatenate([np.ravel(array) for array in learn(inputs).values.values()])
    assert values.dtype == np.float64 and np.abs(values - 0.3).max() > 0.005
    one = values if one is None else one
    np.testing.assert_allclose(values, one, rtol=0, atol=1e-12, err_msg=str(devices))


def batch_step(devices):
    # An objective that compares all examples, 17 a task: 3 for a device, or 2, or none.
    draw, tasks, size = np.random.default_rng(0).standard_normal, 2, 17
    base = {"kernel": draw((4, 8))}
    deltas = task_vectors(base, [{"kernel": base["kernel"] + draw((4, 8))} for _ in range(tasks)])
    granularity = granularities.row(granularities.shapes_of(base, deltas))

    def forward(parameters, heads, inputs):
        states = inputs["x"] @ materialize(parameters)["kernel"]
        return [
            TaskOutputs(of_task[:, 0], {0: of_task[:, None]})
            for of_task in jnp.split(states, tasks)
        ]

    learner = make_learner(
        forward,
        granularity,
        CONSTRAINTS["free"],
        hidden_state_alignment([0], relative=True),
        optax.sgd(0.1),
        devices=devices,
    )
    targets = [Targets(expert_hidden_states={0: draw((size, 1, 8))}) for _ in range(tasks)]
    batch = Batch({"x": draw((tasks * size, 4))}, np.full((tasks, size), 1 / size), targets)
    base = {name: devices.parameter(name, array) for name, array in base.items()}
    deltas = {name: devices.delta(name, delta) for name, delta in deltas.items()}
    initial = granularity.init(granularities.constant({"kernel": (4, 8)}, tasks, 0.3))
    state = devices.replicate(learner.init(initial))
    state, per_task = learner.step(state, Frozen(base, deltas, ()), batch.spread(devices))
    return np.concatenate([np.ravel(learner.coefficients(state)["kernel"]), per_task])


one = batch_step(ONE_DEVICE)
for model in (1, 4):
    np.testing.assert_allclose(batch_step(open_devices(model)), one, rtol=0, atol=1e-12)
"""


RECOMMENDED = {"preset": "recommended", "coefficients": {"initial": 0.3}}
"""From the start that is chosen for these experts so few steps gain nothing."""


@pytest.fixture(scope="module")
def encoder(image_fields) -> dict[str, Any]:
    """A vision transformer, 6 examples in a batch, which 8 devices do not share evenly."""
    tasks = {
        name: {key: own for key, own in task.items() if key != "test"}
        for name, task in image_fields["tasks"].items()
    }
    learning = LEARNING | {"batch_size": 3}
    return image_fields | RECOMMENDED | {"tasks": tasks, "learning": learning}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Any]:
    """Adapters of a decoder, 24 examples in a batch."""
    root = tmp_path_factory.mktemp("adapters")
    fields, _ = save_experts("llama", root)
    letter_tokenizer().save_pretrained(root / "base")
    for seed, (task, own) in enumerate(fields["tasks"].items()):
        rows = [{"text": text} for text in sentences(20, seed)]
        own["calibration"] = str(write_json_lines(root / f"{task}.jsonl", rows))
    return fields | RECOMMENDED | {"learning": LEARNING | {"batch_size": 8}}


def learn(fields: Mapping[str, Any]) -> Coefficients:
    """What one device learns."""
    recipe = parse_recipe(dict(fields))
    inputs = learning_inputs(recipe, Path("/"))
    return learn_coefficients(
        inputs, show_stage=lambda *what: nullcontext(lambda progress: None)
    ).coefficients


def require_close(found: Coefficients, expected: Coefficients) -> None:
    assert found.step == expected.step > 0
    assert found.values.keys() == expected.values.keys()
    for group, values in expected.values.items():
        np.testing.assert_allclose(found.values[group], values, rtol=0, atol=1e-5, err_msg=group)
    # Far more than the tolerance.
    assert max(np.abs(values - 0.3).max() for values in expected.values.values()) > 0.005


def on_virtual_devices(count: int) -> dict[str, str]:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    return os.environ | {"XLA_FLAGS": flags}


LAYOUTS = [("encoder", 1), ("encoder", 8), ("adapters", 4)]


@pytest.fixture(scope="module")
def on_eight(encoder, adapters, tmp_path_factory) -> dict[tuple[str, int], Path]:
    """Folders of what eight devices learn, and of the programs by which they do.

    In the same process, in float64, the encoder with an objective without stored targets, which are
    float32, and an objective that compares all examples of a batch.
    """
    root = tmp_path_factory.mktemp("eight")
    folders = {}
    for kind, model in LAYOUTS:
        folder = folders[kind, model] = root / f"{kind}-{model}"
        folder.mkdir()
        fields = encoder if kind == "encoder" else adapters
        write_recipe(folder, fields | {"devices": {"model": model}})
    in_float64 = write_recipe(root, encoder | {"preset": "adamerging"})
    command = [
        sys.executable,
        "-c",
        WITHOUT_PYTORCH + LEARN,
        *map(str, folders.values()),
        str(in_float64),
    ]
    subprocess.run(command, env=on_virtual_devices(8), check=True, cwd=Path(__file__).parents[1])
    return folders


def facts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "facts.json").read_text())


def test_eight_devices_learn_what_one_does(on_eight, encoder, adapters):
    expected = {"encoder": learn(encoder), "adapters": learn(adapters)}
    for (kind, model), folder in on_eight.items():
        require_close(Coefficients.load(folder / "coefficients.safetensors"), expected[kind])
        facts = facts_of(folder)
        assert facts["devices"] == f"8 devices (cpu; data {8 // model} x model {model})"
        if kind == "encoder":
            parts = facts["parts"]
            assert parts["vit.encoder.layer.*.intermediate.dense.weight"] == [2, 32 // model, 24]
            assert parts["vit.encoder.layer.*.intermediate.dense.bias"] == [2, 32]
            patches = parts["vit.embeddings.patch_embeddings.projection.weight"]
            assert patches == [24 // model, 3, 4, 4]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_gathered_and_coefficients_summed(on_eight, layout):
    """All communication of a compiled step, to the byte: none grows with the batch."""
    facts = facts_of(on_eight[layout])
    assert facts["programs"]
    for program in facts["programs"]:
        by_kind = {}
        for kind, size, rounds in program:
            by_kind.setdefault(kind, []).append((size, rounds))
        # The gradients of what is learned, and the objective of each task.
        sums = by_kind.pop("all-reduce")
        assert sum(size * rounds for size, rounds in sums) == 4 * (
            facts["learned"] + facts["tasks"]
        )
        weights = Counter((size, depth) for size, depth in facts["layers"].values())
        gathers = Counter(by_kind.pop("all-gather", []))
        if layout[0] == "adapters":
            # Their factors are gathered too, whose merged matrix nobody needs.
            assert gathers.keys() >= weights.keys()
            assert not by_kind
            continue
        scatters = Counter(by_kind.pop("reduce-scatter", []))
        assert not by_kind
        # Forwards, and again backwards where a layer is computed again; a gradient once.
        assert all(weights[one] <= gathers[one] <= 2 * weights[one] for one in gathers | weights)
        mixed = [facts["layers"][name] for name in facts["mixed"] if name in facts["layers"]]
        assert scatters == Counter(map(tuple, mixed))
        assert bool(weights) == (layout[1] > 1)


def test_two_processes(image_fields, tmp_path):
    """Whole runs by the command: one merge, written once, each process with a part of it."""
    fields = image_fields | RECOMMENDED | {"learning": LEARNING, "export": {}}
    fields |= {"evaluation": {"baselines": "quick", "task_arithmetic": [0.2, 0.4]}}
    recipe = write_recipe(tmp_path, fields)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = f"{WITHOUT_PYTORCH}{WITHOUT_FIGURES}from adamerge_jax.cli.main import main; main()"
    command = [sys.executable, "-c", script, "learn"]
    command += [str(recipe), "--out", str(tmp_path / "two"), "--devices.distributed"]
    command += ["--devices.coordinator", f"127.0.0.1:{port}", "--devices.processes", "2"]
    command += ["--devices.model", "2"]
    processes = [
        subprocess.Popen(
            [*command, "--devices.process", str(index)],
            env=on_virtual_devices(1),
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    cli.main(["learn", str(recipe), "--out", str(tmp_path / "one")])
    one, two = tmp_path / "one", tmp_path / "two"
    require_close(*(Coefficients.load(run / "coefficients.safetensors") for run in (two, one)))
    assert "2 processes" in printed[0] and "held-out loss" in printed[0]
    ours = [line for line in printed[1].splitlines() if "Gloo" not in line]
    assert not any("loss" in line or "checkpoint" in line for line in ours)
    for name in ("metrics.jsonl", "results.json"):
        lines = [(run / name).read_text().splitlines() for run in (two, one)]
        assert len(lines[0]) == len(lines[1])
    results = [json.loads((run / "results.json").read_text())["rows"] for run in (two, one)]
    assert [row["method"] for row in results[0]] == [row["method"] for row in results[1]]
    for mine, expected in zip(*results, strict=True):
        assert mine["tasks"] == pytest.approx(expected["tasks"])
    assert sorted(f.name for f in two.iterdir()) == sorted(f.name for f in one.iterdir())
    arrays, expected = (load_parameters(run / "orbax") for run in (two, one))
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(arrays[name], array, rtol=0, atol=1e-5)


class FakeMesh(NamedTuple):
    """How an array is split depends on nothing else of a mesh."""

    shape: dict[str, int]


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("a.weight", (8, 12), ("model",)),
        ("a.weight", (6, 12), (None, "model")),
        ("a.weight", (6, 3, 4, 8), (None, None, None, "model")),
        ("a.weight", (6, 10), ()),
        ("a.bias", (8,), ()),
        ("a.*.weight", (4, 8, 12), (None, "model")),
        ("a.*.bias", (4, 8), ()),
    ],
)
def test_how_parameters_are_split(name, shape, expected):
    devices = Devices(FakeMesh({"data": 2, "model": 4}))
    whole = int(".*." in name)
    assert devices._split(shape, whole) == PartitionSpec(*expected)
    # A delta has an axis of experts in front, which is whole.
    after = (*([None] if whole else []), None, *expected[whole:]) if expected else ()
    delta = (*shape[:whole], 5, *shape[whole:])
    assert devices._split(delta, whole + 1) == PartitionSpec(*after)


def test_one_device_is_left_alone():
    assert open_devices() is ONE_DEVICE
    backbone = object()
    assert ONE_DEVICE.spread(backbone) is backbone
    batch = {"pixel_values": np.zeros((3, 2))}
    assert ONE_DEVICE.examples(batch) is batch


def test_what_is_refused():
    with pytest.raises(InputError, match=r"devices.model: 3 does not divide the 1 devices"):
        open_devices(model=3)
    fields = {"base": "b", "tasks": {"t": {"expert": "e", "calibration": "c"}}}
    with pytest.raises(InputError, match=r"devices.processes: is for several processes"):
        parse_recipe(fields | {"devices": {"processes": 2}})


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc keeps what is freed")
def test_freed_memory_goes_back_to_the_system():
    process = psutil.Process()
    blocks = [b"x" * 100_000 for _ in range(600)]
    last = blocks[-1]  # what lies before it in memory is kept
    del blocks
    before = process.memory_info().rss
    return_freed_memory()
    assert process.memory_info().rss < before - 40e6
    assert len(last) == 100_000
