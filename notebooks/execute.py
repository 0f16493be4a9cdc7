"""Runs notebooks from top to bottom and keeps their outputs: `python notebooks/execute.py FILE...`.

Needs the `test` extra. Nothing of the machine stays in the file: no times, no paths of the kernel.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Runs each notebook in a folder of its own and writes it back."""
    for name in sys.argv[1:]:
        file = Path(name)
        notebook = nbformat.read(file, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, Path(folder))
        nbformat.write(clean(notebook), file)


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Runs the cells in place.

    `adamerge_jax` and the files of `experiments/` can be imported, wherever the folder is.

    Args:
        notebook: What to run.
        folder: Where it runs, and where it finds and leaves its files.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed.
    """
    paths = [ROOT, ROOT / "experiments", os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, map(str, paths)))}
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment)


def clean(notebook: NotebookNode) -> NotebookNode:
    """The notebook without what differs from one run or machine to the next."""
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    for position, cell in enumerate(notebook.cells):
        cell.metadata = NotebookNode()
        cell.id = f"cell-{position}"
        if cell.cell_type == "code":
            # What libraries warn of is about this machine, not about the notebook.
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    main()
