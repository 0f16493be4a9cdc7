"""Every notebook runs from top to bottom, and lies in the repository as a run left it."""

import ast
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from rich.console import Console

from adamerge_jax.quickstart import prepare
from tests.references import load_script

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SCRIPTS = [path.stem for path in (ROOT / "experiments").iterdir()]
RUNNER = load_script(FOLDER / "execute.py")


LONG = {
    "ablation": {
        "STEPS = 60": "STEPS = 3",
        "[10, 25, 70, 200]": "[40]",
        '("task", "tensor", "row")\n': '("row",)\n',
        'for name in ("task", "row")\n': 'for name in ("row",)\n',
        '"osD", strict=True': '"o", strict=True',
    },
    "add_an_expert": {'= "faint", 60': '= "faint", 15'},
    "merge_in_twenty_lines": {
        '"base": "base",': '"base": "base", "learning": {"steps": 5, "copies": 0},'
    },
    "own_model": {"steps=300": "steps=30", "steps=500": "steps=30"},
    "reading_a_map": {
        '{"initial": 0.3}}': '{"initial": 0.3}, "learning": {"steps": 5, "copies": 0}}'
    },
}
"""What a test writes instead, so that a notebook learns less, by its name."""


OURS = {"adamerge_jax", *(path.stem for path in ROOT.iterdir()), *SCRIPTS}
"""The modules of the repository, of which a notebook imports the public names alone."""

EXAMPLES = {"calibration": 60, "validation": 12, "test": 12}
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


class Shell(InteractiveShell):
    """Runs cells without a screen: pictures that `%matplotlib inline` shows are only drawn."""

    def enable_gui(self, gui: str | None = None) -> None:
        pass


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs(file: Path, tmp_path: Path, quickstart: Path, monkeypatch: pytest.MonkeyPatch):
    """In this process, which has imported and compiled most of it already."""
    notebook = nbformat.read(file, as_version=4)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    for long, short in LONG.get(file.stem, {}).items():
        assert any(long in cell for cell in cells)
        cells = [cell.replace(long, short) for cell in cells]
    (tmp_path / "quickstart").symlink_to(quickstart)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*RUNNER.PATHS, *sys.path])
    shell = Shell()
    try:
        for cell in cells:
            shell.run_cell(cell).raise_error()
    finally:
        plt.close("all")
        shell.history_manager.end_session()


def test_the_script_keeps_what_cells_print(tmp_path: Path):
    code = "import os\nimport adamerge_jax\nprint(sorted(os.listdir()))"
    cells = [nbformat.v4.new_markdown_cell("A text."), nbformat.v4.new_code_cell(code)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    (tmp_path / "folder").mkdir()
    RUNNER.execute(notebook, tmp_path / "folder", tmp_path)
    (output,) = RUNNER.clean(notebook).cells[1].outputs
    assert output["text"] == "['quickstart']\n"


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_uses_public_names_that_exist(file: Path):
    cells = nbformat.read(file, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    nodes = list(ast.walk(ast.parse(re.sub(r"^%.*", "", code, flags=re.MULTILINE))))
    modules = {"am": importlib.import_module("adamerge_jax")}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.module.partition(".")[0] not in OURS
        if isinstance(node, ast.Import):
            for name in node.names:
                is_public = (name.name, name.asname) == ("adamerge_jax", "am")
                assert is_public or name.name.partition(".")[0] not in OURS
    for text in {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}:
        root, _, attributes = text.partition(".")
        value = modules.get(root)
        assert value is None or attributes.split(".")[0] in dir(value)
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
