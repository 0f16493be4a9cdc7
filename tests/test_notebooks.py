"""Every notebook runs from top to bottom, and lies in the repository as a run left it."""

import re
from pathlib import Path

import pytest

from tests.references import load_script

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
RUNNER = load_script(FOLDER / "execute.py")


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs(file: Path, tmp_path: Path):
    RUNNER.execute(nbformat.read(file, as_version=4), tmp_path)


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
