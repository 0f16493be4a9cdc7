"""The page on the architecture names what there is, and what it says to add works once added."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from rich.console import Console
from safetensors.numpy import load_file

import adamerge_jax
from adamerge_jax import parse_recipe
from adamerge_jax.coefficients.granularities import (
    GRANULARITIES,
    constant,
    make_granularity,
)
from adamerge_jax.methods import METHODS
from adamerge_jax.mixing import materialize, mix
from adamerge_jax.models import ARCHITECTURES, family_of
from adamerge_jax.models.family import complete_head
from adamerge_jax.objectives import Targets, TargetSpec, TaskOutputs
from adamerge_jax.pipeline import export
from adamerge_jax.pipeline.run_merge import merge
from adamerge_jax.task_vectors import task_vectors
from tests.models.test_decoders import SIZES, TOLERANCE, padded_batch
from tests.references import (
    WITHOUT_PYTORCH,
    parameters_of,
    randomise,
    saved_parameters,
    write_recipe,
)

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def section(heading: str) -> str:
    return PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def added(heading: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of a section's first sample, imported as if its file were there."""
    module = ModuleType(new_file(heading).replace("/", "."))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(samples(heading)[0], module.__dict__)
    return module


def new_file(heading: str) -> str:
    (file,) = re.findall(r"`(adamerge_jax/[\w/]+)\.py`:", section(heading))
    assert not (ROOT / f"{file}.py").exists()
    return file


def samples(heading: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", section(heading), re.DOTALL)


def changes(heading: str) -> list[tuple[str, list[str]]]:
    """The files that a section's diff changes, with the hunks for each."""
    diff = re.search(r"```diff\n(.*?)```", section(heading), re.DOTALL)[1]
    files = re.split(r"^--- (.*)\n", diff, flags=re.MULTILINE)[1:]
    return [
        (file, hunks.split("@@\n")) for file, hunks in zip(files[::2], files[1::2], strict=True)
    ]


def apply(file: Path, hunks: list[str]) -> None:
    """Makes the changes of a diff without line numbers: the old lines stand once in the file."""
    text = file.read_text()
    for hunk in hunks:
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    file.write_text(text)


ROOMS = re.findall(r"^\| (`.*?) \|", section("The rooms"), re.MULTILINE)
RANKS = {name: rank for rank, row in enumerate(ROOMS) for name in re.findall(r"`(\w+)", row)}
"""The row of each room and loose module in the table."""


def test_it_names_every_room():
    package = Path(adamerge_jax.__file__).parent
    modules = {file.stem for file in package.glob("*.py")} - {"__init__"}
    rooms = {folder.parent.name for folder in package.glob("*/__init__.py")}
    assert set(RANKS) == modules | rooms


def imported_rooms(node: ast.AST) -> Iterator[str]:
    """The rooms that code imports from, except for annotations."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.ImportFrom) and node.module == "adamerge_jax":
        yield from (name.name for name in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module.startswith("adamerge_jax."):
        yield node.module.split(".")[1]
    for child in ast.iter_child_nodes(node):
        yield from imported_rooms(child)


def test_rooms_import_from_the_rows_above():
    package = Path(adamerge_jax.__file__).parent
    for file in package.rglob("*.py"):
        room = file.relative_to(package).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for imported in imported_rooms(ast.parse(file.read_text())):
            assert RANKS[imported] <= RANKS[room], f"{file} imports {imported}"


def test_files_that_it_names_exist():
    mentioned = re.findall(r"`([\w/]+/[\w]+\.(?:py|md|yaml))`(?!:)", PAGE)
    assert mentioned
    for file in mentioned:
        assert any((folder / file).exists() for folder in (ROOT, ROOT / "adamerge_jax")), file


def test_a_granularity(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(GRANULARITIES, "band", added("How to add a granularity", monkeypatch).band)
    generator = np.random.default_rng(0)

    def draw(size):
        return generator.normal(size=size).astype(np.float32)

    base = {
        "layers": {"*": {"weight": draw(size=(2, 5, 3))}},
        "out": {"weight": draw(size=(4, 3)), "bias": draw(size=4)},
    }
    experts = [jax.tree.map(lambda leaf: leaf + draw(size=leaf.shape), base) for _ in range(2)]
    deltas = task_vectors(base, experts)
    shapes = {"layers.*.weight": (2, 5, 3), "out.weight": (4, 3), "out.bias": (4,)}
    granularity = make_granularity("band", {"rows": 3}, shapes)
    values = granularity.init(constant(shapes, experts=2, value=0.0))
    assert {name: array.shape for name, array in values.items()} == {
        "layers.*.weight": (2, 2, 2),  # layers, experts, bands
        "out.weight": (1, 2, 2),
        "out.bias": (1, 2),
    }
    values = {name: jnp.asarray(draw(size=array.shape)) for name, array in values.items()}
    merged = materialize(mix(base, deltas, granularity.scales(values)))
    by_row = np.repeat(np.asarray(values["layers.*.weight"]), 3, axis=-1)[..., :5]
    expected = base["layers"]["*"]["weight"] + sum(
        by_row[:, k, :, None] * (expert["layers"]["*"]["weight"] - base["layers"]["*"]["weight"])
        for k, expert in enumerate(experts)
    )
    np.testing.assert_allclose(merged["layers"]["*"]["weight"], expected, atol=1e-5)  # float32
    assert granularity.keeps_factors(shapes) and granularity.along_axes(shapes)


def test_an_objective_on_existing_targets(monkeypatch: pytest.MonkeyPatch):
    objective = added("How to add an objective on existing targets", monkeypatch).logit_distance()
    targets = Targets(expert_logits=jnp.array([[0.0, 3.0], [0.0, 3.0]]))
    values = objective.value(TaskOutputs(jnp.array([[1.0, 2.0], [5.0, 1.0]])), targets)
    np.testing.assert_allclose(values, [1.0, 12.25])
    assert objective.target_spec == TargetSpec(expert_logits=True)


PREPARE = """
import sys
from pathlib import Path
import numpy as np
from adamerge_jax import load_recipe
from adamerge_jax.objectives import OBJECTIVES, TaskOutputs
from adamerge_jax.objectives.margin_alignment import margin_alignment
from adamerge_jax.pipeline.learn import prepare
from adamerge_jax.pipeline.workspace import open_workspace
from adamerge_jax.recipes.build import build

OBJECTIVES["margin_alignment"] = margin_alignment
recipe = load_recipe(Path(sys.argv[1]))
workspace = open_workspace(recipe, Path(sys.argv[1]).parent)
method = build(recipe, workspace.models)
targets = next(prepare(method, workspace).calibration.batches()).targets
for objective, of_task in zip(method.objectives.values(), targets, strict=True):
    assert (of_task.expert_margin > 0).all() and of_task.expert_logits is None
    logits = np.stack([of_task.expert_margin + 2, np.zeros(len(of_task.expert_margin))], axis=1)
    np.testing.assert_allclose(objective.value(TaskOutputs(logits), of_task), 4, rtol=1e-5)
"""


def test_an_objective_with_a_new_kind_of_target(text_recipe: dict, tmp_path: Path):
    """A copy of the package with the section's changes computes and stores the target."""
    heading = "How to add an objective with a new kind of target"
    copy = tmp_path / "copy"
    shutil.copytree(Path(adamerge_jax.__file__).parent, copy / "adamerge_jax")
    assert len(changes(heading)) == 2
    for file, hunks in changes(heading):
        apply(copy / file, hunks)
    (copy / f"{new_file(heading)}.py").write_text(samples(heading)[0])
    chosen = {"objectives": [{"name": "margin_alignment"}], "coefficients": {"granularity": "task"}}
    recipe = write_recipe(tmp_path, text_recipe | chosen)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PYTORCH + PREPARE, str(recipe)],
        env=os.environ | {"PYTHONPATH": str(copy)},
        cwd=copy,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_an_architecture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    module = added("How to add an architecture", monkeypatch)
    monkeypatch.setitem(ARCHITECTURES, "seed_oss", module.__name__)
    config = transformers.SeedOssConfig(**SIZES, head_dim=10, attention_out_bias=True)
    model = randomise(transformers.SeedOssForCausalLM(config))
    family = family_of(config)
    backbone, head = family.build_backbone(config), family.build_head(config)
    parameters = parameters_of(backbone, saved_parameters(model, tmp_path))
    batch = padded_batch(None)
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(array) for name, array in batch.items()}).logits
    logits = head(complete_head(head, {}, parameters), backbone(parameters, batch))
    np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=TOLERANCE)


def test_a_method_and_an_export_format(
    text_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    method = added("How to add a merge method without learning", monkeypatch)
    monkeypatch.setitem(METHODS, "median", method.median)
    exporter = eval(
        samples("How to add an export format")[1],
        added("How to add an export format", monkeypatch).__dict__ | {"Exporter": export.Exporter},
    )
    monkeypatch.setattr(export, "EXPORTERS", (exporter,))
    merge(
        parse_recipe(text_recipe),
        "median",
        {},
        root=tmp_path,
        out=tmp_path / "merged",
        console=Console(quiet=True),
    )
    base = load_file(Path(text_recipe["base"]) / "model.safetensors")
    experts = [
        load_file(Path(task["expert"]) / "model.safetensors")
        for task in text_recipe["tasks"].values()
    ]
    written = {file.stem: np.load(file) for file in (tmp_path / "merged/numpy").glob("*.npy")}
    assert set(written) == {f"bert.{name}" for name in base}
    for name, array in written.items():
        of_experts = [expert[name] for expert in experts]
        np.testing.assert_allclose(array, np.median(of_experts, axis=0), atol=1e-6)  # float32
