"""Every notebook runs from top to bottom, and lies in the repository as a run left it."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from adamerge_jax.quickstart import prepare
from tests.references import load_script

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
RUNNER = load_script(FOLDER / "execute.py")


LONG = {
    "ablation": {
        "STEPS = 60": "STEPS = 5",
        "[10, 25, 70, 200]": "[40]",
        '("task", "tensor", "row")\n': '("task", "row")\n',
        '"osD", strict=True': '"os", strict=True',
    },
    "add_an_expert": {'= "faint", 60, 0.03': '= "faint", 4, 0.03'},
    "merge_in_twenty_lines": {
        '"base": "base",': '"base": "base", "learning": {"steps": 5, "copies": 0},'
    },
    "own_model": {"steps=300": "steps=30", "steps=500": "steps=30"},
    "reading_a_map": {
        'read_fields(folder / "recipe.yaml")': 'read_fields(folder / "recipe.yaml") | '
        '{"learning": {"steps": 5, "copies": 0}}'
    },
}
"""What a test writes instead, so that a notebook learns less, by its name."""


EXAMPLES = {"calibration": 60, "validation": 30, "test": 30}
"""How many images of each task a notebook gets, where the quickstart has hundreds."""


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's base and experts, hardly trained, with a part of its images."""
    folder = tmp_path_factory.mktemp("quickstart")
    prepare(folder, 0, Console(quiet=True), base_steps=10, expert_steps=10)
    for part, count in EXAMPLES.items():
        for file in (folder / "data").glob(f"*.{part}.npz"):
            with np.load(file) as arrays:
                fewer = {name: array[:count] for name, array in arrays.items()}
            np.savez(file, **fewer)
    return folder


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """A client whose kernel runs one notebook after the other: starting one takes seconds."""
    client = RUNNER.make_client()
    yield client
    client._cleanup_kernel()


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs(file: Path, tmp_path: Path, quickstart: Path, client: Any):
    notebook = nbformat.read(file, as_version=4)
    for long, short in LONG.get(file.stem, {}).items():
        changed = [cell for cell in notebook.cells if long in cell.source]
        assert changed
        for cell in changed:
            cell.source = cell.source.replace(long, short)
    # Nothing is left of the notebook before.
    fresh = f"%reset -f\nimport os\nos.chdir({str(tmp_path)!r})\ndel os"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(fresh))
    RUNNER.execute(notebook, tmp_path, quickstart, client)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_uses_names_that_exist(file: Path):
    cells = nbformat.read(file, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    nodes = list(ast.walk(ast.parse(re.sub(r"^%.*", "", code, flags=re.MULTILINE))))
    modules = {"am": importlib.import_module("adamerge_jax")}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("adamerge_jax"):
            module = importlib.import_module(node.module)
            for name in node.names:
                value = getattr(module, name.name)
                if isinstance(value, ModuleType):
                    modules[name.name] = value
    for text in {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}:
        root, _, attributes = text.partition(".")
        value = modules.get(root)
        for name in attributes.split("."):
            if isinstance(value, ModuleType):
                value = getattr(value, name)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_shows_its_outputs_and_nothing_of_a_machine(file: Path):
    text = file.read_text()
    notebook = nbformat.reads(text, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not re.search(r"(?<![\w.])/(home|tmp|root|usr|work|Users)/", text)
    assert nbformat.reads(text, as_version=4) == RUNNER.clean(notebook)
