"""Runs notebooks from top to bottom and keeps their outputs.

    python notebooks/execute.py --quickstart quickstart notebooks/*.ipynb

Needs the `test` extra, and the folder that `adamerge quickstart` makes.
Nothing of the machine stays in the file: no times, no paths of the kernel.
"""

import argparse
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
PATHS = [str(ROOT)]
"""The folder that notebooks import `adamerge_jax` from, where it is not installed."""


def main() -> None:
    """Runs each notebook in a folder of its own and writes it back."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="+", type=Path, help="files to run")
    parser.add_argument(
        "--quickstart",
        required=True,
        type=Path,
        help="the folder that `adamerge quickstart` made; notebooks find it beside them",
    )
    arguments = parser.parse_args()
    for file in arguments.notebooks:
        notebook = nbformat.read(file, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, Path(folder), arguments.quickstart)
        nbformat.write(clean(notebook), file)


def execute(notebook: NotebookNode, folder: Path, quickstart: Path) -> None:
    """Runs the cells in place.

    `adamerge_jax` can be imported, wherever the folder is.

    Args:
        notebook: What to run.
        folder: Where it runs and leaves its files.
        quickstart: The quickstart's models and data, which it finds as `quickstart/` there.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed.
    """
    paths = [*PATHS, os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    (folder / "quickstart").symlink_to(quickstart.resolve())
    client = NotebookClient(notebook, timeout=3600, kernel_name="python3")
    client.execute(env=environment, cwd=str(folder))


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
