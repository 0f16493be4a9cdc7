"""Every notebook runs from top to bottom, and lies in the repository as a run left it."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.references import load_script

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
RUNNER = load_script(FOLDER / "execute.py")


PREPARE = """
import sys
from pathlib import Path
from rich.console import Console
from tests.references import load_script

script = load_script(Path("experiments", "quickstart.py"))
script.BASE_STEPS, script.EXPERT_STEPS = 250, 100
script.prepare(Path(sys.argv[1]), 0, Console(quiet=True))
"""

LONG = {
    "ablation": {"STEPS = 60": "STEPS = 10", "[10, 25, 70, 200]": "[10, 200]"},
    "add_an_expert": {'= "faint", 60, 0.03': '= "faint", 15, 0.03'},
    "merge_in_twenty_lines": {'"base": "base",': '"base": "base", "learning": {"steps": 10},'},
}
"""What a test writes instead, so that a notebook learns less, by its name."""


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's base and experts, less trained: enough for experts that differ."""
    folder = tmp_path_factory.mktemp("quickstart")
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent)}
    del environment["XLA_FLAGS"]  # compiled for speed, as it trains
    command = [sys.executable, "-c", PREPARE, str(folder)]
    subprocess.run(command, check=True, cwd=FOLDER.parent, env=environment)
    return folder


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs(file: Path, tmp_path: Path, quickstart: Path):
    notebook = nbformat.read(file, as_version=4)
    for long, short in LONG.get(file.stem, {}).items():
        (cell,) = (cell for cell in notebook.cells if long in cell.source)
        cell.source = cell.source.replace(long, short)
    RUNNER.execute(notebook, tmp_path, quickstart)


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
